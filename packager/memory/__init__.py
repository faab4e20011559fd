"""Peak memory of a choice, and where the coefficients of that model come from."""
