"""Checkpoints that are quantised already: 8-bit floats with scales are undone exactly, all others refused by name.

FP8 stores w as an 8-bit float and a scale: w = code · scale. The scale belongs to the tensor, to a row, or to a block
(of 128 × 128 in DeepSeek's and Qwen's checkpoints, `weight_scale_inv`). Codes of integers, groups and codebooks
(GPTQ, AWQ, bitsandbytes …) are another model than the one that was trained: to round them again adds one loss to
another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from packager.errors import ModelError, UnsupportedModelError
from packager.io.safetensors_ranges import StoredTensor

_SIDE_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "modelopt",
}
_SIGNS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".weight.absmax": "bitsandbytes",
    "._data": "quanto",
    "_blocks": "MXFP4",
}
_SCALES = ("_scale_inv", "_scale")
# What the runtime that they were made for rounds activations and the cache with; the weights do not depend on them.
_UNUSED = ("input_scale", "activation_scale", "input_activation_scale", "output_scale", "k_scale", "v_scale")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")


def refuse_quantised(source: str, folder: Path, config: Mapping[str, Any]) -> None:
    """UnsupportedModelError that names the method, where it is not one that `dequantised` undoes."""
    quantization = config.get("quantization_config", config.get("compression_config"))
    if quantization is None and isinstance(config.get("quantization"), Mapping):
        raise _refusal(source, "MLX")
    if quantization is None:
        for name, method in _SIDE_FILES.items():
            if (folder / name).is_file():
                raise _refusal(source, f"{method}, says {name}")
        return
    if not isinstance(quantization, Mapping):
        raise ModelError(f"{source}: config.json's quantization_config is no object: the file is damaged")
    if not _is_float8(quantization):
        raise _refusal(source, _method(quantization))


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a configuration that `refuse_quantised` let pass is of a checkpoint for `dequantised`."""
    return config.get("quantization_config", config.get("compression_config")) is not None


def refuse_packed_tensors(source: str, names: Iterable[str]) -> None:
    """UnsupportedModelError for weights whose names say that they are packed, whatever the configuration says."""
    for name in names:
        for sign, method in _SIGNS.items():
            if name.endswith(sign):
                raise _refusal(source, f"{method}, says its tensor {name}")


def dequantised(
    source: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """All weights by name in `dtype`: 8-bit floats times their scales, computed in float32, and what is not quantised
    as it is. ModelError where a scale is missing or does not fit."""
    quantization = config.get("quantization_config", config.get("compression_config"))
    block = (quantization or {}).get("weight_block_size")
    scales = {name + end for name, tensor in tensors.items() if tensor.dtype in _FLOAT8 for end in _SCALES}
    weights = {}
    for name, tensor in tensors.items():
        if name in scales or name.endswith(_UNUSED):
            continue
        value = _read(name, tensor)
        if tensor.dtype in _FLOAT8:
            scale = next((name + end for end in _SCALES if name + end in tensors), None)
            if scale is None:
                raise ModelError(
                    f"{source}: {name} is of 8-bit floats and has no scale ({name}_scale_inv or {name}_scale): the "
                    "checkpoint is incomplete, download it again"
                )
            value = value.float() * _spread(
                _read(scale, tensors[scale]).float(), value.shape, block, f"{source}: {scale}"
            )
        weights[name] = value.to(dtype) if value.is_floating_point() else value
    return weights


def stored_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that are left once 8-bit floats are undone."""
    scales = {name + end for name, tensor in tensors.items() if tensor.dtype in _FLOAT8 for end in _SCALES}
    return {name: tensor for name, tensor in tensors.items() if name not in scales and not name.endswith(_UNUSED)}


def _read(name: str, tensor: StoredTensor) -> torch.Tensor:
    with safe_open(tensor.region.path, framework="pt") as file:
        value: torch.Tensor = file.get_tensor(name)
    return value


def _spread(scale: torch.Tensor, shape: torch.Size, block: Any, where: str) -> torch.Tensor:
    """`scale` as it multiplies a matrix of `shape`: one value, one a row, or one a block."""
    if scale.numel() == 1:
        return scale.reshape(())
    rows, cols = shape[0], shape[-1]
    if len(shape) == 2 and scale.shape in ((rows,), (rows, 1)):
        return scale.reshape(rows, 1)
    sides = block if isinstance(block, list) and len(block) == 2 and all(type(side) is int for side in block) else None
    if len(shape) == 2 and sides and min(sides) > 0 and scale.shape == (-(-rows // sides[0]), -(-cols // sides[1])):
        return scale.repeat_interleave(sides[0], 0)[:rows].repeat_interleave(sides[1], 1)[:, :cols]
    raise ModelError(
        f"{where} is of shape {tuple(scale.shape)}: expected one scale for the tensor of shape {tuple(shape)}, one a "
        f"row, or one a block of {block}"
    )


def _is_float8(quantization: Mapping[str, Any]) -> bool:
    match _name(quantization):
        case "fp8":
            return bool(quantization.get("expert_dtype", "fp8") == "fp8")
        case "fbgemm_fp8":
            return True
        case "compressed-tensors":
            return bool(quantization.get("format") == "float-quantized" and not quantization.get("sparsity_config"))
        case _:
            return False


def _name(quantization: Mapping[str, Any]) -> str:
    name = quantization.get("quant_method")
    return name if isinstance(name, str) else ""


def _method(quantization: Mapping[str, Any]) -> str:
    name = _name(quantization) or next(
        (name for name in ("bitsandbytes",) for key in quantization if key.startswith(("load_in_", "bnb_"))), "unnamed"
    )
    details = [str(quantization[key]) for key in ("quant_algo", "format") if isinstance(quantization.get(key), str)]
    if type(quantization.get("bits")) is int:
        details.append(f"{quantization['bits']} bits")
    return ", ".join([name, *details])


def _refusal(source: str, method: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source} is quantised already ({method}): expected weights as they were trained: give the unquantised "
        "original, which its model card names"
    )
