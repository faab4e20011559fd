"""A model folder before anything is loaded: what it is, told from its small files, and that its settings are sane."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packager.errors import ModelError, UnsupportedModelError
from packager.source.identify import identify, refuse_unless_language_model
from packager.source.quantised import refuse_quantised
from packager.source.stored_weights import require_readable

CONFIG_FILE = "config.json"
_ADAPTER_FILE = "adapter_config.json"
_EMBEDDERS = ("modules.json", "config_sentence_transformers.json")
_PIPELINE_FILE = "model_index.json"
TELLING_FILES = (
    CONFIG_FILE,
    _ADAPTER_FILE,
    *_EMBEDDERS,
    _PIPELINE_FILE,
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)
"""Small files that say what a folder is."""
_OURS = {"map.json": "a score map of this packager", "packager.json": "a bundle of this packager"}
# Larger than any model that there is: a hostile number is not to cost memory or hours.
_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 31,
}
_FLAGS = ("tie_word_embeddings", "is_encoder_decoder")


def read_config(folder: Path, source: str) -> dict[str, Any]:
    """The configuration of the language model in `folder`.

    Raises UnsupportedModelError for all else that a folder may be, by what it is: adapters, pipelines, embedders,
    encoders, vision models, models with code of their own, quantised ones. ModelError for a configuration that is
    damaged.
    """
    for name, what in _OURS.items():
        if (folder / name).is_file():
            raise ModelError(f"{source} is {what}: expected the model that it was made from")
    if (folder / _ADAPTER_FILE).is_file():
        raise _adapter(folder, source)
    if (folder / _PIPELINE_FILE).is_file():
        raise UnsupportedModelError(
            f"{source} is a diffusers pipeline ({_PIPELINE_FILE}), which makes pictures or sound: give a decoder of "
            "text"
        )
    for name in _EMBEDDERS:
        if (folder / name).is_file():
            raise UnsupportedModelError(
                f"{source} is a sentence-transformers model ({name}), which embeds text and generates none: give a "
                "language model"
            )
    path = folder / CONFIG_FILE
    if not path.is_file():
        parts = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        raise ModelError(
            f"{source} holds no config.json: expected a Hugging Face model folder with config.json, *.safetensors and "
            f"a tokenizer" + (f"; there is one in {parts[0]}" if parts else "")
        )
    config = _object(path, "download it again")
    if "_diffusers_version" in config:
        raise UnsupportedModelError(
            f"{source} is a part of a diffusers pipeline ({config.get('_class_name', 'unnamed')}), not a language "
            "model: give a decoder of text"
        )
    refuse_unless_language_model(source, identify(config))
    refuse_quantised(source, folder, config)
    _require_sane(path, config)
    return config


def _adapter(folder: Path, source: str) -> UnsupportedModelError:
    base = _object(folder / _ADAPTER_FILE, "download it again").get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    beside = (folder / CONFIG_FILE).is_file()
    return UnsupportedModelError(
        f"{source} holds an adapter{of} ({_ADAPTER_FILE}): merge it into its base first (peft: "
        "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)) and give the merged folder"
        + ("; to pack the base without it, take the adapter's files away" if beside else "")
    )


def _object(path: Path, advice: str) -> dict[str, Any]:
    require_readable(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        # Half of a character, spelled as an escape, can be shown to nobody.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}): {advice}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({str(error)[:100]}): {advice}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}: {advice}")
    return value


def _require_sane(path: Path, config: Mapping[str, Any]) -> None:
    for key, limit in _SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= limit):
            raise ModelError(
                f"{path}: {key} is {_short(value)}: expected a whole number from 1 to {limit:,}: download it again"
            )
    for key in _FLAGS:
        if not isinstance(config.get(key), bool | None):
            raise ModelError(f"{path}: {key} is {_short(config[key])}: expected true or false: download it again")
    for key, value in _settings(config):
        # transformers fetches a kernel of that name from the hub, and runs it.
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise UnsupportedModelError(
                f"{path}: {key} names {_short(value)}, code on the hub, which is never run here: take {key} out"
            )
        if key in ("transformers_weights", "use_kernels"):
            raise UnsupportedModelError(f"{path}: {key} is not supported: take it out of config.json")


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _settings(value)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:40] + "…"
