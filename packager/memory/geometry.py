"""The shape of a model as far as memory goes, read from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.errors import UnsupportedModelError
from packager.io.files import read_json
from packager.io.records import Count, Dimension, Layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The shape of a decoder as far as memory goes.

    `nodes` counts the nodes of the exported graph, `tokenizer_bytes` is the size of tokenizer.json. `tokenizer_entries`
    counts its tokens and merges; 0 estimates it from the size, which holds for a file that transformers indented.
    Of `layers`, `sliding_layers` keep only the last `sliding_window` tokens. `cache_element_bytes` is 1 where the cache
    holds 8-bit codes; 0 where it holds the runtime's floats, whose width the coefficients know. In a context beyond
    `whole_prompt_tokens` a prompt must be prefilled in one piece, for its later tokens change what its first ones are
    (longrope); 0 where any piece will do. `cacheless_layers` keep no keys and values (convolutions, linear
    attention); `hybrid_bytes` is what such layers hold whatever the context: their states and their kernels.
    """

    layers: Layers
    hidden: Dimension
    intermediate: Dimension
    heads: Dimension
    kv_heads: Dimension
    head_dim: Dimension
    vocab: Dimension
    nodes: Count
    tokenizer_bytes: Count
    tokenizer_entries: Count = 0
    sliding_window: Count = 0
    sliding_layers: Layers = 0
    cache_element_bytes: Count = 0
    whole_prompt_tokens: Count = 0
    cacheless_layers: Layers = 0
    hybrid_bytes: Count = 0

    @property
    def whole_cache_layers(self) -> int:
        """Layers whose cache holds every token of the context."""
        return self.layers - self.sliding_layers - self.cacheless_layers

    def chunk_tokens(self, wanted: int, context_tokens: int) -> int:
        """The largest piece of a prompt in a context: as `wanted`, or the whole of it where it must not be cut."""
        whole = 0 < self.whole_prompt_tokens < context_tokens
        return context_tokens if whole else wanted


def read_geometry(
    config: PretrainedConfig,
    *,
    nodes: int,
    tokenizer: Path,
    genai: Mapping[str, Any],
    whole_prompt_tokens: int = 0,
    cacheless_layers: int = 0,
    hybrid_bytes: int = 0,
) -> Geometry:
    """Geometry of a decoder; `nodes` of its exported graph, its tokenizer.json, the exporter's genai_config.json, the
    context beyond which a prompt is one piece, if there is one, and what layers without keys and values come to.

    optimum knows the attribute names of each architecture; where it does not know the architecture, the plain names
    are tried. Raises UnsupportedModelError naming what is missing.
    """
    from optimum.utils import NormalizedConfigManager

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
        whole_prompt_tokens=whole_prompt_tokens,
        sliding_layers=len(sliding.get("layers", [])),
        cacheless_layers=cacheless_layers,
        hybrid_bytes=hybrid_bytes,
    )


def tokenizer_entries(content: Mapping[str, Any]) -> int:
    """Tokens and merges in the content of a tokenizer.json: what its tables are made of, however the file is
    laid out."""
    model = content.get("model", {})
    return len(model.get("vocab", ())) + len(model.get("merges", ()))
