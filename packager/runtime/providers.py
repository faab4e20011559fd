"""Execution providers: how ONNX Runtime names them, and whether this machine's has them."""

from __future__ import annotations

from packager.errors import RuntimeCheckError

_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
"""A profile's provider → its name in ONNX Runtime."""


def require_supported(provider: str) -> None:
    """RuntimeCheckError where this machine's ONNX Runtime lacks the provider, so that nothing can be run for it
    here."""
    import onnxruntime as ort

    wanted = _NAMES[provider]
    if wanted not in ort.get_available_providers():
        raise RuntimeCheckError(
            f"this machine's ONNX Runtime has no {wanted}: validate on the device with check.py, or build with "
            "--no-validate"
        )
