"""The shape of a model as far as memory goes, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum.utils import NormalizedConfigManager
from transformers import PretrainedConfig

from packager.errors import UnsupportedModelError
from packager.files import read_json
from packager.memory import Geometry, tokenizer_entries


def read_geometry(config: PretrainedConfig, *, nodes: int, tokenizer: Path, genai: Mapping[str, Any]) -> Geometry:
    """Geometry of a decoder; `nodes` of its exported graph, its tokenizer.json, the exporter's genai_config.json.

    optimum knows the attribute names of each architecture; where it does not know the architecture, the plain names
    are tried. Raises UnsupportedModelError naming what is missing.
    """
    try:
        names = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:
        names = config

    def number(*candidates: str, default: int | None = None) -> int:
        for source in (names, config):
            for name in candidates:
                value = getattr(source, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        if default is None:
            raise UnsupportedModelError(f"the configuration of {config.model_type} has no {candidates[0]}")
        return default

    sliding = genai["model"]["decoder"].get("sliding_window") or {}
    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head")
    return Geometry(
        layers=number("num_layers", "num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=number("intermediate_size", "ffn_hidden_size", default=4 * hidden),
        heads=heads,
        kv_heads=number("num_key_value_heads", "multi_query_group_num", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        vocab=number("vocab_size"),
        nodes=nodes,
        tokenizer_bytes=tokenizer.stat().st_size,
        tokenizer_entries=tokenizer_entries(read_json(tokenizer)),
        sliding_window=int(sliding.get("window_size", 0)),
        sliding_layers=len(sliding.get("layers", [])),
    )
