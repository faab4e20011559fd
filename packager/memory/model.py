"""Peak resident memory of the whole device process, from shapes alone.

The process is python + onnxruntime-genai + one bundle on ONNX Runtime's CPU kernels. What is predicted is `VmHWM`
of a fresh process that loads the model and its tokenizer, prefills a prompt in chunks and decodes:

    load     process, not yet run + nodes + weights multiplied + the largest unit again, mapped while it is repacked
    prefill  process + nodes + weights + tokenizer, live and freed + KV cache + activations of one chunk
             + one layer's key/value cache, dequantised, where the cache holds codes
             - what the cache and the activations find free where the tokenizer was parsed
    decode   as prefill, for the allocators give nothing back: what the chunk's activations held is slack

docs/memory.md derives every term and says how its coefficient was measured. Nothing here reads a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from packager.errors import ArtifactError
from packager.forms.base import TableForm
from packager.forms.kinds import KINDS, Kind
from packager.forms.registry import Form
from packager.memory.geometry import Geometry
from packager.profile import MemoryCoefficients

_FLOAT = 4
# What `graph.prefill` adds to a layer over a cache of codes, and what it holds of the past of the one layer at work.
_BRANCH_NODES = 16
_WIDENED_BYTES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryItem:
    """One term of the sum, never negative."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPhase:
    """What is resident at the worst moment of one phase of the process."""

    name: str
    items: tuple[MemoryItem, ...]

    @property
    def bytes(self) -> int:
        """The phase's sum."""
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The phases in the order they happen. The peak is the first phase of the most bytes."""

    phases: tuple[MemoryPhase, ...]

    @property
    def peak(self) -> MemoryPhase:
        """The first phase of the most bytes."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def items(self) -> tuple[MemoryItem, ...]:
        """The terms that sum up to the peak."""
        return self.peak.items

    @property
    def peak_bytes(self) -> int:
        """Predicted VmHWM of the process."""
        return self.peak.bytes

    @property
    def peak_phase(self) -> str:
        """Name of the phase in which the peak falls."""
        return self.peak.name

    def to_dict(self) -> dict[str, Any]:
        """Plain data, bytes throughout."""
        phases = {phase.name: {item.name: item.bytes for item in phase.items} for phase in self.phases}
        return {"peak_bytes": self.peak_bytes, "peak_phase": self.peak_phase, "phases": phases}


def resident_bytes(
    form: Form,
    rows: int,
    cols: int,
    *,
    kind: Kind,
    coefficients: MemoryCoefficients,
    context_tokens: int | None = None,
    named_rows: int | None = None,
) -> int:
    """Bytes that one weight unit of shape (rows, cols) occupies once it is loaded and `context_tokens` were seen.

    A matrix that is multiplied is repacked into memory of its own. One that is only looked up is mapped, and counts
    with the pages that the context's tokens touch: all of them where `context_tokens` is None. A tied unit is both.
    Only its first `named_rows` can be looked up, where the tokenizer has no token for the others; all where None.
    """
    if kind not in KINDS:
        raise ArtifactError(f"kind {kind!r} is unknown: expected one of {', '.join(KINDS)}")
    looked_up = looked_up_bytes(
        form,
        rows,
        cols,
        kind=kind,
        coefficients=coefficients,
        context_tokens=context_tokens,
        named_rows=named_rows,
    )
    if kind == "embedding":
        return looked_up
    repacked = form.heap_bytes(rows, cols, coefficients.packed_scale_copies)
    return repacked + form.mapped_bytes(rows, cols) + looked_up


def looked_up_bytes(
    form: Form,
    rows: int,
    cols: int,
    *,
    kind: Kind,
    coefficients: MemoryCoefficients,
    context_tokens: int | None = None,
    named_rows: int | None = None,
) -> int:
    """The part of `resident_bytes` that is only touched as tokens come, not while the model loads."""
    if kind not in ("embedding", "tied"):
        return 0
    if not isinstance(form, TableForm):
        raise ArtifactError(f"form {form.label!r}: an embedding cannot be stored in factors")
    named = rows if named_rows is None else named_rows
    return sum(
        _touched_bytes(spec.bytes * named // rows, context_tokens, coefficients)
        for spec in form.tensors(rows, cols).values()
    )


def estimate(
    geometry: Geometry,
    *,
    weights_bytes: int,
    largest_unit_bytes: int,
    context_tokens: int,
    prompt_tokens: int,
    chunk_tokens: int,
    coefficients: MemoryCoefficients,
    looked_up_bytes: int = 0,
) -> MemoryEstimate:
    """The memory of one process, phase by phase.

    `weights_bytes` is the sum of `resident_bytes` over all units, `largest_unit_bytes` the `form_bytes` of the largest
    unit that is multiplied, `looked_up_bytes` the part of `weights_bytes` that loading does not touch. The cache of all
    `context_tokens` is written when a generator is created, however short the prompt.
    """
    session = MemoryItem(
        name="runtime session (graph nodes)", bytes=graph_nodes(geometry) * coefficients.session_bytes_per_node
    )
    load = (
        MemoryItem(name="Python and the runtime libraries", bytes=coefficients.process_load_bytes),
        session,
        MemoryItem(name="weights", bytes=weights_bytes - looked_up_bytes),
        MemoryItem(name="largest matrix, while it is repacked", bytes=largest_unit_bytes),
    )
    entries = geometry.tokenizer_entries or geometry.tokenizer_bytes // coefficients.tokenizer_file_bytes_per_entry
    live, freed = (
        entries * coefficients.tokenizer_live_bytes_per_entry,
        entries * coefficients.tokenizer_freed_bytes_per_entry,
    )
    states = MemoryItem(name="states of convolutions and linear attention", bytes=geometry.hybrid_bytes)
    hybrid = (states,) if states.bytes else ()
    cache = cache_bytes(geometry, context_tokens, chunk_tokens, coefficients)
    chunk = min(chunk_tokens, prompt_tokens)
    prefill = activation_bytes(geometry, chunk, coefficients)
    decode = activation_bytes(geometry, 1, coefficients)
    widened = widened_bytes(geometry, chunk, prompt_tokens)
    reused = min(cache + prefill + widened, int(freed * coefficients.reuse_ratio))
    common = (
        MemoryItem(name="Python and the runtime libraries", bytes=coefficients.process_bytes),
        session,
        MemoryItem(name="weights", bytes=weights_bytes),
        MemoryItem(name="tokenizer", bytes=live),
        MemoryItem(name="freed tokenizer memory, not reused", bytes=freed - reused),
        MemoryItem(name="key/value cache", bytes=cache),
        MemoryItem(name="rotary embedding tables", bytes=context_tokens * geometry.head_dim * _FLOAT),
        *hybrid,
    )
    past = (MemoryItem(name="one layer's key/value cache, dequantised", bytes=widened),) if widened else ()
    return MemoryEstimate(
        phases=(
            MemoryPhase(name="load", items=load),
            MemoryPhase(
                name="prefill", items=(*common, MemoryItem(name="activations and logits", bytes=prefill), *past)
            ),
            MemoryPhase(
                name="decode",
                items=(
                    *common,
                    MemoryItem(name="activations and logits", bytes=decode),
                    MemoryItem(
                        name="memory that the runtime's allocator keeps", bytes=max(0, prefill + widened - decode)
                    ),
                ),
            ),
        )
    )


def cache_bytes(geometry: Geometry, context_tokens: int, chunk_tokens: int, coefficients: MemoryCoefficients) -> int:
    """Keys and values of every layer for the whole context, or for its window and one chunk; past and present share one
    buffer."""
    tokens = geometry.whole_cache_layers * context_tokens + geometry.sliding_layers * min(
        context_tokens, geometry.sliding_window + chunk_tokens
    )
    return (
        2
        * tokens
        * geometry.kv_heads
        * geometry.head_dim
        * (geometry.cache_element_bytes or coefficients.kv_element_bytes)
    )


def graph_nodes(geometry: Geometry) -> int:
    """Nodes of the graph as it is run: the exported ones, and those that prefill over a cache of codes takes."""
    return geometry.nodes + _BRANCH_NODES * _branched_layers(geometry)


def widened_bytes(geometry: Geometry, rows: int, tokens: int) -> int:
    """What several `rows` over a cache of codes hold beside their activations, `tokens` deep: one layer's keys and
    values in floats as the past and as the present, 8 bytes an element, and what the arena leaves between pieces that
    grow by the chunk.
    """
    if rows < 2 or not _branched_layers(geometry):
        return 0
    return _WIDENED_BYTES * 2 * tokens * geometry.kv_heads * geometry.head_dim


def activation_bytes(geometry: Geometry, rows: int, coefficients: MemoryCoefficients) -> int:
    """What one run over `rows` tokens holds: its widest layer's activations, and the last token's logits."""
    width = geometry.intermediate + max(geometry.hidden, geometry.heads * geometry.head_dim)
    return (
        int(
            rows * width * _FLOAT * coefficients.activation_copies + geometry.vocab * _FLOAT * coefficients.logit_copies
        )
        + coefficients.run_bytes
    )


def _branched_layers(geometry: Geometry) -> int:
    return geometry.whole_cache_layers if geometry.cache_element_bytes == 1 else 0


def _touched_bytes(table_bytes: int, tokens: int | None, coefficients: MemoryCoefficients) -> int:
    """Mapped bytes of a table of `table_bytes` that a text of `tokens` tokens makes resident.

    The text has `distinct` different tokens far enough apart to touch a window of pages each (a power law, as
    Heaps' for words); they fall into the table's windows at random, some into the same one.
    """
    if tokens is None or not table_bytes:
        return table_bytes
    distinct = min(tokens, coefficients.distinct_factor * tokens**coefficients.distinct_exponent)
    return int(table_bytes * -math.expm1(-distinct * coefficients.fault_bytes / table_bytes))
