"""What a GGUF file says of its model, held against what transformers makes of it.

transformers maps some fields of each architecture to its configuration and passes over all others. Here every field
and every tensor is accounted for: mapped, harmless, put into the configuration, or of a value that changes nothing.
What is left would change what the model says, so it is refused by name.

Fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and gguf-py's constants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from packager.errors import ModelError, UnsupportedModelError
from packager.source.gguf_header import GgufTensor, read_gguf_header
from packager.source.stored_weights import require_readable

_MAGIC = b"GGUF"
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_FOLDER_INSTEAD = "give the model's Hugging Face folder instead"
# Sections about the file and the text; the tokenizer's are read where the tokenizer is.
_OTHER_SECTIONS = ("GGUF", "general", "tokenizer", "split", "quantize", "imatrix", "mradermacher", "hub")
# Fields that say nothing of what the model computes: sizes that the tensors' shapes say as well, notes of the maker.
_HARMLESS = {
    "vocab_size",
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "bos_token_id",
    "eos_token_id",
}
# Fields that the configuration has a place for, which transformers leaves at the class's own value.
_PLACES = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "logit_scale": "logit_scale",
    "expert_used_count": "num_experts_per_tok",
}
_SLIDING = ("phi3", "mistral")  # the architectures whose configuration slides in every layer if it has a window
# Values at which a field changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (False,),
}
_LLAMA3_ORIGINAL = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """A GGUF file's words: `fields` without the tokenizer's lists, and the type and shape of each tensor (rows first).
    `frequencies` are the divisors of the rotation's frequencies that it holds, (head size / 2)."""

    path: Path
    architecture: str
    fields: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    frequencies: tuple[float, ...] | None


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever its name."""
    require_readable(path)
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def open_gguf(path: Path) -> GgufFile:
    """Read and check the words of a GGUF file. ModelError when it is damaged, a part, or no model of text."""
    require_readable(path)
    if match := _SPLIT.fullmatch(path.name):
        raise _split(path, int(match[2]), int(match[3]), f"{match[1]}.gguf")
    header = read_gguf_header(path)
    fields = header.fields
    number, count = (fields.get(f"split.{field}", 0) for field in ("no", "count"))
    if type(count) is int and type(number) is int and count > 1:
        raise _split(path, number + 1, count, f"{path.stem}-whole.gguf")
    kind = fields.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{path} is of general.type {str(kind)[:40]!r}, not a whole language model: give the model that it belongs "
            "to"
        )
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{path} names no general.architecture: it is damaged, download it again")
    _require_known(path, architecture)
    for name, tensor in header.tensors.items():
        _require_readable_type(path, name, tensor.type)
    return GgufFile(
        path=path,
        architecture=architecture,
        fields=fields,
        tensors={name: tensor.shape for name, tensor in header.tensors.items()},
        frequencies=_frequencies(path, header.tensors.get("rope_freqs.weight")),
    )


def _frequencies(path: Path, tensor: GgufTensor | None) -> tuple[float, ...] | None:
    if tensor is None:
        return None
    with path.open("rb") as file:
        file.seek(tensor.start)
        values = np.frombuffer(file.read(tensor.stop - tensor.start), dtype="<f4")
    if tensor.type != 0 or not len(values) or not np.isfinite(values).all():
        raise ModelError(f"{path}: rope_freqs.weight holds no finite float32 numbers: the file is damaged")
    return tuple(values.tolist())


def _split(path: Path, number: int, count: int, whole: str) -> UnsupportedModelError:
    first = re.sub(r"-\d{5}-of-", "-00001-of-", path.name)
    return UnsupportedModelError(
        f"{path} is part {number} of {count} of a split model: join the parts with llama.cpp's tool "
        f"(llama-gguf-split --merge {first} {whole}) and give {whole}"
    )


def _require_known(path: Path, architecture: str) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {re.sub(r"[-_]", "", name) for name in GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}
    if re.sub(r"[-_]", "", architecture) not in known:
        raise UnsupportedModelError(
            f"{path} is of architecture {architecture!r}, which transformers cannot read from GGUF: {_FOLDER_INSTEAD}"
        )


def _require_readable_type(path: Path, name: str, number: int) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(number)
    block, size = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        readable = True
    except NotImplementedError:
        readable = False
    if not readable:
        raise UnsupportedModelError(
            f"{path}: {name} is of type {kind.name} ({block} weights in {size} bytes), which transformers cannot read: "
            f"give a file of another quantisation (Q8_0, F16), or {_FOLDER_INSTEAD}"
        )


def complete_config(file: GgufFile, config: PretrainedConfig) -> None:
    """Put into `config` what transformers left out of it. UnsupportedModelError for a field whose value would change
    what the model says and has no place there."""
    mapped = _mapped(config)
    for name, value in sorted(file.fields.items()):
        section, _, field = name.partition(".")
        if section in _OTHER_SECTIONS:
            continue
        if section != file.architecture:
            raise _ignored(file, name, value)
        if field in mapped or field in _HARMLESS or value in _NEUTRAL.get(field, ()):
            continue
        try:
            known = _takes(config, field, value)
        except Exception:  # a value of another kind than the field's
            known = False
        if not known:
            raise _ignored(file, name, value)
    _rotation(file, config)


def _mapped(config: PretrainedConfig) -> set[str]:
    """Fields that transformers reads into the configuration of this type.

    It takes the rotated part of a head for the whole where it maps `rope.dimension_count`: that is for `_takes`.
    """
    from transformers.integrations import GGUF_CONFIG_MAPPING

    kind = config.model_type.removesuffix("_text")
    return {field for field, place in GGUF_CONFIG_MAPPING.get(kind, {}).items() if place} - {"rope.dimension_count"}


def _takes(config: PretrainedConfig, field: str, value: Any) -> bool:
    """Whether `config` says the same as a field, or was made to."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    match field:
        case "rope.dimension_count":
            return bool(value == round(head * (getattr(config, "partial_rotary_factor", None) or 1.0)))
        case "attention.value_length":
            return bool(value == head)
        case "attention.scale":
            scale = float(getattr(config, "query_pre_attn_scalar", None) or head) ** -0.5
            return bool(abs(value - scale) < 1e-6 * scale)
        case "attention.sliding_window" if config.model_type in _SLIDING:
            config.sliding_window = int(value)
            return True
        case "attention.sliding_window":
            return bool(value == getattr(config, "sliding_window", None))
        case "rope.scaling.original_context_length":
            return bool(value == config.max_position_embeddings)
        case "rope.freq_base":
            parameters = getattr(config, "rope_parameters", None) or {}
            return bool(value == parameters.get("rope_theta"))
        case _ if field in _PLACES and hasattr(config, _PLACES[field]):
            setattr(config, _PLACES[field], value)
            return True
        case _:
            return False


def _ignored(file: GgufFile, name: str, value: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{file.path} says {name} = {str(value)[:80]}, which transformers does not read from GGUF and which may change "
        f"what the model says: {_FOLDER_INSTEAD}"
    )


def _rotation(file: GgufFile, config: PretrainedConfig) -> None:
    """Llama 3's scaling of the rotation stands in a tensor of divisors: say it in the configuration.

    llama.cpp's converter writes the divisors; of the four parameters behind them only the factor differs between the
    published models (8 or 32).
    """
    factors = file.frequencies
    if factors is None or all(factor == 1.0 for factor in factors):
        return
    theta = float((config.rope_parameters or {}).get("rope_theta", 10000.0))
    expected = _llama3_divisors(theta, max(factors), 2 * len(factors))
    if config.model_type != "llama" or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{file.path} scales its rotation by rope_freqs.weight in a way that is not Llama 3's, and transformers "
            f"does not read it: {_FOLDER_INSTEAD}"
        )
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": max(factors),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }


def _llama3_divisors(theta: float, factor: float, size: int) -> list[float]:
    """What Llama 3 divides each frequency by: 1 for short waves, `factor` for long ones, and between them a mean."""
    divisors = []
    for index in range(0, size, 2):
        wave = 2 * np.pi * theta ** (index / size)
        if wave < _LLAMA3_ORIGINAL / 4:
            divisors.append(1.0)
        elif wave > _LLAMA3_ORIGINAL:
            divisors.append(factor)
        else:
            smooth = (_LLAMA3_ORIGINAL / wave - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def require_used(file: GgufFile, model: torch.nn.Module) -> None:
    """ModelError when the file holds a tensor that `model` (which may lie on `meta`) has no place for, by the names
    that transformers reads it by."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())  # type: ignore[operator, union-attr]
    places = get_gguf_hf_weights_map(model, processor)
    unused = _without_place(file.tensors, places)
    if unused:
        raise ModelError(
            f"{file.path} holds the tensor {unused[0]}, which {type(model).__name__} has no place for ({len(unused)} "
            f"such): {_FOLDER_INSTEAD}"
        )


def _without_place(names: Iterable[str], places: Iterable[str]) -> list[str]:
    places = set(places)
    known = {"rope_freqs.weight"}
    return sorted(
        name
        for name in names
        if name not in places and name not in known and name.removesuffix(".weight") not in places
    )
