"""The forms a weight matrix can be stored in: one class each, with its parts, bytes, kernels, packing and drawing.

base, codes, factored    what all forms can do, those made of codes, those made of two factors
floats, blocks, split,   one form each: how it is named, packed, read back, drawn into a graph and counted in memory
low_rank, pivot
drawing                  the operators a form asks a graph for, and how many nodes they are
packing                  codes to bytes and back
registry                 every form by its label
"""
