"""Edge deployment packager: one score map of a language model, any size from it, ONNX bundles validated on the
target.
"""

__version__ = "0.1.0"
