"""Checkpoints that are quantised already: FP8 undone exactly, the others refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from safetensors.torch import load_file, save_file

from packager.errors import ModelError, UnsupportedModelError
from packager.source.checkpoint import open_checkpoint


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, "awq, 4 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quanto"),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "modelopt, NVFP4"),
        ({"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}}, "fp8"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "compressed-tensors, pack-quantized",
        ),
        ({"quantization_config": {}}, "unnamed"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
def test_methods_are_named(pico_copy: Path, changes: dict[str, Any], said: str) -> None:
    edit(pico_copy, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        open_checkpoint(str(pico_copy))
    assert str(caught.value) == (
        f"{pico_copy} is quantised already ({said}): expected weights as they were trained: give the unquantised "
        "original, which its model card names"
    )


def test_methods_that_other_files_name(pico_copy: Path) -> None:
    (pico_copy / "quantize_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"GPTQ, says quantize_config\.json"):
        open_checkpoint(str(pico_copy))


@pytest.mark.parametrize("end", ["qweight", "weight_packed", "SCB", "weight.absmax"])
def test_methods_that_only_tensors_name(pico_copy: Path, end: str) -> None:
    path = pico_copy / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.0.mlp.up_proj.{end}"] = torch.zeros(4, dtype=torch.int32)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="is quantised already"):
        open_checkpoint(str(pico_copy)).config()


def quantise(folder: Path, scale_of: Callable[[torch.Tensor], torch.Tensor], end: str) -> dict[str, torch.Tensor]:
    """Store the layers' matrices as FP8 with scales by `scale_of`, (rows, cols) → a scale that spreads over them by
    `spread`; what they stand for."""
    path = folder / "model.safetensors"
    stored, meant = {}, {}
    for name, weight in load_file(path).items():
        if weight.dim() == 2 and "proj" in name:
            scale = scale_of(weight)
            wide = spread(scale, weight.shape)
            codes = (weight / wide).to(torch.float8_e4m3fn)
            stored |= {name: codes, name + end: scale, name.replace("weight", "input_scale"): torch.ones(1)}
            meant[name] = codes.float() * wide
        else:
            stored[name] = meant[name] = weight
    save_file(stored, path, metadata={"format": "pt"})
    return meant


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if scale.dim() == 2 and scale.shape[1] > 1:  # blocks of 32 × 16
        return torch.kron(scale, torch.ones(32, 16))[: shape[0], : shape[1]]
    return scale.expand(shape)


def of_blocks(weight: torch.Tensor) -> torch.Tensor:
    rows, cols = -(-weight.shape[0] // 32), -(-weight.shape[1] // 16)
    return torch.rand((rows, cols), generator=torch.Generator().manual_seed(rows)) / 100 + 0.01


@pytest.mark.parametrize(
    ("settings", "scale_of", "end"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [32, 16], "activation_scheme": "dynamic"},
            of_blocks,
            "_scale_inv",
        ),
        ({"quant_method": "fp8", "activation_scheme": "static"}, lambda weight: torch.tensor(0.013), "_scale_inv"),
        (
            {"quant_method": "fbgemm_fp8"},
            lambda weight: torch.linspace(0.01, 0.02, len(weight))[:, None],
            "_scale",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            lambda weight: torch.linspace(0.01, 0.02, len(weight))[:, None],
            "_scale",
        ),
    ],
)
def test_fp8_is_undone_exactly(
    pico_copy: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    scale_of: Any,
    end: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    meant = quantise(pico_copy, scale_of, end)
    edit(pico_copy, quantization_config=settings)
    checkpoint = open_checkpoint(str(pico_copy))
    found = checkpoint.load().state_dict()
    for name, value in meant.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()
    assert next(checkpoint.load(torch.bfloat16).parameters()).dtype == torch.bfloat16
    config = checkpoint.config()
    runtime_tokenizer = checkpoint.runtime_tokenizer(config, checkpoint.tokenizer())
    checkpoint.save_side_files(tmp_path / "out", config, runtime_tokenizer)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert capfd.readouterr() == ("", "")


def test_scales_that_are_missing_or_do_not_fit(pico_copy: Path, picos: Callable[[str], Pico]) -> None:
    quantise(pico_copy, of_blocks, "_scale_inv")
    edit(pico_copy, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ModelError, match=r"down_proj.weight_scale_inv is of shape \(2, 7\): expected one scale for"):
        open_checkpoint(str(pico_copy)).load()
    path = pico_copy / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, path, metadata={"format": "pt"})
    edit(pico_copy, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 16]})
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight is of 8-bit floats and has no scale"):
        open_checkpoint(str(pico_copy)).load()
