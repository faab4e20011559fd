"""Names in the exporter's graph that the rest of the package relies on."""

from __future__ import annotations

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
MATRIX_SUFFIX = ".MatMul.weight"
