"""Model in, scored options out."""
