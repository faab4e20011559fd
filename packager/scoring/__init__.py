"""A model in, scored options out: the one computation per model."""
