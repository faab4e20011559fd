"""The forms a weight matrix can be stored in: one class each, with its parts, bytes, kernels and packing."""
