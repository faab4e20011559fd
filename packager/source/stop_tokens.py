"""The tokens at which the source model stops, wherever it says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from packager.errors import UnsupportedModelError
from packager.io.files import read_json

_GGUF_ROLES = ("eos", "eot", "eom")


def stop_tokens(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation: Mapping[str, Any],
    gguf: Mapping[str, Any],
) -> list[int]:
    """Ids of all tokens that end a generation: those of the configuration, of its text part, of the generation
    configuration, of the tokenizer, and of a GGUF's end of sequence, turn and message fields. In the order found.

    UnsupportedModelError when nobody names one, or one is no token id.
    """
    text = getattr(config, "text_config", None)
    sources: list[tuple[str, Any]] = [
        ("config.json", getattr(config, "eos_token_id", None)),
        ("config.json (text_config)", getattr(text, "eos_token_id", None)),
        ("generation_config.json", generation.get("eos_token_id")),
        *((f"tokenizer.ggml.{role}_token_id", gguf.get(f"tokenizer.ggml.{role}_token_id")) for role in _GGUF_ROLES),
        ("the tokenizer's eos_token", tokenizer.eos_token_id),
    ]
    found: list[int] = []
    for origin, value in sources:
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise UnsupportedModelError(f"{origin} names the stop token {number!r}: expected the id of a token")
            if number >= 0 and number not in found:  # -1 is some configurations' word for none
                found.append(number)
    if not found:
        raise UnsupportedModelError(
            "neither config.json nor generation_config.json nor the tokenizer names a stop token: nothing would end "
            'an answer; add "eos_token_id" to config.json'
        )
    return found


def with_stop_tokens(config: PretrainedConfig, stops: list[int]) -> PretrainedConfig:
    """`config` that names all of `stops`; itself where it does already."""
    named = config.eos_token_id
    if (named if isinstance(named, list) else [named]) == stops:
        return config
    copy = config.__class__.from_dict(config.to_dict())
    copy.eos_token_id = stops[0] if len(stops) == 1 else stops
    return copy


def generation_settings(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json, {} without one. ArtifactError when it is not readable."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}
