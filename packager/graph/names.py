"""Names of the exporter's, of its files and in its graph, that the rest of the package relies on."""

from __future__ import annotations

GRAPH_FILE = "graph.onnx"
"""The graph without its weights."""

GENAI_FILE = "genai_config.json"
"""The runtime's configuration, beside the graph."""

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
MATRIX_SUFFIX = ".MatMul.weight"

CACHE_PREFIX = "past_key_values."
"""What the graph's inputs of keys and values begin with."""

ATTENTION = "GroupQueryAttention"
QUERY, PAST_KEY, TOTAL, COSINES, KEY_SCALE = 0, 3, 6, 7, 12
"""Inputs of ATTENTION by number; values follow keys."""

ROTARY_PREFIXES = ("cos_cache", "sin_cache")
"""What the names of its rotary tables begin with: a row for each position."""
