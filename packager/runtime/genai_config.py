"""The runtime's configuration, `genai_config.json`: the exporter's, bounded to what one device runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packager.profile import INT8


@dataclass(frozen=True, kw_only=True, slots=True)
class GenaiBounds:
    """What a bundle's runtime is bounded to: `graph_file` as seen from the configuration, tokens of the context and of
    one chunk of a prompt, what the key/value cache holds ("float" or "int8"), and threads, 0 for the runtime's choice.
    """

    graph_file: str
    context_tokens: int
    chunk_tokens: int
    kv_cache: str
    threads: int


def bounded_config(exported: Mapping[str, Any], bounds: GenaiBounds) -> dict[str, Any]:
    """A copy of the `exported` configuration, bounded.

    The runtime allocates `max_length` at once, so the model's full context would be memory for nothing. Prefill in
    chunks bounds the activations (and on CPU is faster). Unknown keys are parse errors there: ours stay out.
    """
    config: dict[str, Any] = copy.deepcopy(dict(exported))
    decoder = config["model"]["decoder"]
    decoder["filename"] = bounds.graph_file
    config["model"]["context_length"] = bounds.context_tokens
    config["search"]["max_length"] = bounds.context_tokens
    config["search"]["chunk_size"] = bounds.chunk_tokens
    if bounds.kv_cache == INT8:
        # A pattern of allocations is kept from the first chunk and its block held beside what deeper chunks need
        # (docs/memory.md).
        decoder["session_options"]["enable_mem_pattern"] = False
    if bounds.threads:
        decoder["session_options"]["intra_op_num_threads"] = bounds.threads
    return config
