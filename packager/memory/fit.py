"""From measured processes to the memory model's coefficients: least squares on what each step of a process added.

    load       heap - codes and floats    = base + nodes · session_bytes_per_node + scales · packed_scale_copies
    tokenizer  malloc's bytes in use      = base + entries · tokenizer_live_bytes_per_entry
               heap - live                = base + entries · tokenizer_freed_bytes_per_entry
    running    heap - cache - its floats  = rows · width · activation_copies + vocabulary · logit_copies + run_bytes
                                            - freed · reuse_ratio
    peaks      VmHWM - every other term   = process_load_bytes, process_bytes

Each line is fitted after those above it. A coefficient that the readings do not pin down keeps its default, and the
others are fitted again beside it. Pure functions over numbers; docs/memory.md explains the terms.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packager.forms.kinds import Kind
from packager.forms.registry import Form, form_bytes
from packager.memory.geometry import Geometry
from packager.memory.model import (
    MemoryEstimate,
    activation_bytes,
    cache_bytes,
    estimate,
    graph_nodes,
    looked_up_bytes,
    resident_bytes,
    widened_bytes,
)
from packager.profile import MemoryCoefficients

# A value whose standard error is more than this share of it, or that lies more than this factor off its default, is not
# believed.
_WORST_ERROR_SHARE = 0.3
_WORST_FACTOR = 4.0
NOT_OF_THE_DEVICE = {
    "tokenizer_file_bytes_per_entry": "is of tokenizer files, not of a device",
    "kv_element_bytes": "is of the graph, not of a device",
    "distinct_factor": "is of texts, not of a device",
    "distinct_exponent": "is of texts, not of a device",
    "margin_bytes": "is of how the libraries come to lie in the page cache, which changes on one device",
}
"""Coefficients that a calibration leaves alone, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkUnit:
    """One weight matrix W of shape (rows, cols), how it is stored and what it is for."""

    name: str
    rows: int
    cols: int
    form: Form
    kind: Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One process as the memory model sees it. Of its context, `used_tokens` are filled in the end."""

    geometry: Geometry
    units: tuple[WorkUnit, ...]
    context_tokens: int
    prompt_tokens: int
    used_tokens: int
    chunk_tokens: int

    @property
    def rows(self) -> int:
        """Tokens of the largest run."""
        return min(self.chunk_tokens, self.prompt_tokens)

    def weights_bytes(self, coefficients: MemoryCoefficients) -> int:
        """`resident_bytes` of all units."""
        return sum(
            resident_bytes(
                unit.form,
                unit.rows,
                unit.cols,
                kind=unit.kind,
                coefficients=coefficients,
                context_tokens=self.used_tokens,
            )
            for unit in self.units
        )

    def estimate(self, coefficients: MemoryCoefficients) -> MemoryEstimate:
        """What the memory model says of it."""
        return estimate(
            self.geometry,
            weights_bytes=self.weights_bytes(coefficients),
            looked_up_bytes=sum(
                looked_up_bytes(
                    unit.form,
                    unit.rows,
                    unit.cols,
                    kind=unit.kind,
                    coefficients=coefficients,
                    context_tokens=self.used_tokens,
                )
                for unit in self.units
            ),
            largest_unit_bytes=max(
                form_bytes(unit.form, unit.rows, unit.cols) for unit in self.units if unit.kind != "embedding"
            ),
            context_tokens=self.context_tokens,
            prompt_tokens=self.prompt_tokens,
            chunk_tokens=self.chunk_tokens,
            coefficients=coefficients,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a process holds after one step, in bytes: heap, file pages, and the most of both together so far."""

    anonymous_bytes: int
    mapped_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One measured process: before, after loading, after the tokenizer, at its end.

    `tokenizer_heap_bytes` is what malloc gave out for the tokenizer, None where it cannot say.
    """

    workload: Workload
    start: Held
    load: Held
    tokenizer: Held
    end: Held
    tokenizer_heap_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What became of one coefficient: `value` is fitted, or is the default and `kept` says why."""

    name: str
    value: float
    default: float
    error: float = 0.0
    kept: str = ""


def fit(
    readings: Sequence[Reading], base: MemoryCoefficients, fault_bytes: int | None
) -> tuple[MemoryCoefficients, tuple[Finding, ...]]:
    """The coefficients that the readings tell, the rest as in `base`, and what became of each. `fault_bytes` was
    measured apart."""
    findings = _touching(fault_bytes, base)
    found = _taken(base, findings)
    for phase in (_loading, _tokenizer_in_use, _tokenizer_freed, _running, _peaks):
        new = phase(readings, found, base)
        found = _taken(found, new)
        findings |= new
    findings |= {name: _keep(name, base, why) for name, why in NOT_OF_THE_DEVICE.items()}
    return found, tuple(findings[field.name] for field in dataclasses.fields(base) if field.name in findings)


def _taken(found: MemoryCoefficients, new: Mapping[str, Finding]) -> MemoryCoefficients:
    """`found` with what is believed of `new`, rounded as a profile writes it."""
    taken: dict[str, Any] = {
        name: round(item.value, None if isinstance(getattr(found, name), int) else 3)
        for name, item in new.items()
        if not item.kept
    }
    return dataclasses.replace(found, **taken)


def _touching(fault_bytes: int | None, base: MemoryCoefficients) -> dict[str, Finding]:
    """What one touch of a mapped file makes resident."""
    name = "fault_bytes"
    if fault_bytes is None:
        return {name: _keep(name, base, "this system does not tell")}
    return {name: _believed(Finding(name=name, value=fault_bytes, default=base.fault_bytes), base)}


def _loading(readings: Sequence[Reading], found: MemoryCoefficients, base: MemoryCoefficients) -> dict[str, Finding]:
    """What loading added to the heap beside codes and floats: of every node, and of every scale."""
    heap = [
        item.load.anonymous_bytes - item.start.anonymous_bytes - _packed_bytes(item.workload, 0.0) for item in readings
    ]
    scales = [_packed_bytes(item.workload, 1.0) - _packed_bytes(item.workload, 0.0) for item in readings]
    columns = {
        "session_bytes_per_node": _column([graph_nodes(item.workload.geometry) for item in readings]),
        "packed_scale_copies": _column(scales),
    }
    return _solve(columns, _column(heap), base, intercept=True)


def _tokenizer_in_use(
    readings: Sequence[Reading], found: MemoryCoefficients, base: MemoryCoefficients
) -> dict[str, Finding]:
    """What malloc gave out for the tokenizer, where it says."""
    known = [item for item in readings if item.tokenizer_heap_bytes is not None]
    live = _column([item.tokenizer_heap_bytes or 0 for item in known])
    return _solve({"tokenizer_live_bytes_per_entry": _entries(known)}, live, base, intercept=True)


def _tokenizer_freed(
    readings: Sequence[Reading], found: MemoryCoefficients, base: MemoryCoefficients
) -> dict[str, Finding]:
    """What the heap grew by besides, while the tokenizer was read."""
    grown = _column([item.tokenizer.anonymous_bytes - item.load.anonymous_bytes for item in readings])
    entries = _entries(readings)
    freed = grown - entries * found.tokenizer_live_bytes_per_entry
    return _solve({"tokenizer_freed_bytes_per_entry": entries}, freed, base, intercept=True)


def _running(readings: Sequence[Reading], found: MemoryCoefficients, base: MemoryCoefficients) -> dict[str, Finding]:
    """What running added to the heap beside the key/value cache."""
    # Where less is asked for than was freed, how much of it is reused cannot be seen.
    asking = [item for item in readings if _run_bytes(item.workload, found) > _freed_bytes(item.workload, found)]
    units = {
        "activation_copies": dataclasses.replace(_zero(base), activation_copies=1.0),
        "logit_copies": dataclasses.replace(_zero(base), logit_copies=1.0),
        "run_bytes": dataclasses.replace(_zero(base), run_bytes=1),
    }
    columns = {
        name: _column([activation_bytes(item.workload.geometry, item.workload.rows, unit) for item in asking])
        for name, unit in units.items()
    }
    columns["reuse_ratio"] = -_column([_freed_bytes(item.workload, found) for item in asking])
    grown = [
        item.end.anonymous_bytes - item.tokenizer.anonymous_bytes - _context_bytes(item.workload, found)
        for item in asking
    ]
    running = _solve(columns, _column(grown), base, intercept=False)
    # Alignment can make it look like more than all.
    reuse = running["reuse_ratio"]
    return running | {"reuse_ratio": dataclasses.replace(reuse, value=min(1.0, reuse.value))}


def _peaks(readings: Sequence[Reading], found: MemoryCoefficients, base: MemoryCoefficients) -> dict[str, Finding]:
    """What is left of the peaks when all that is known is taken off: the process itself, loading and running."""
    rest = dataclasses.replace(found, process_load_bytes=0, process_bytes=0)
    phases = [{phase.name: phase.bytes for phase in item.workload.estimate(rest).phases} for item in readings]
    loads = [item.load.peak_bytes - phase["load"] for item, phase in zip(readings, phases, strict=True)]
    # A process that peaked while it loaded does not tell what it held later.
    runs = [
        item.end.peak_bytes - phase["prefill"]
        for item, phase in zip(readings, phases, strict=True)
        if item.end.peak_bytes > item.load.peak_bytes
    ]
    return {
        name: _upper(name, values, base) for name, values in (("process_load_bytes", loads), ("process_bytes", runs))
    }


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def _entries(readings: Sequence[Reading]) -> NDArray[np.float64]:
    return _column([item.workload.geometry.tokenizer_entries for item in readings])


def _solve(
    columns: Mapping[str, NDArray[np.float64]],
    target: NDArray[np.float64],
    base: MemoryCoefficients,
    *,
    intercept: bool,
) -> dict[str, Finding]:
    """Coefficients x of `target` = Σ x · column (+ a constant), each with its standard error; the least certain ones
    are fixed at their defaults, one after the other, until all that are left are believed."""
    target, left, found = target.copy(), dict(columns), dict[str, Finding]()
    while left:
        names = list(left)
        matrix = np.stack([*left.values(), *([np.ones_like(target)] if intercept else [])], axis=1)
        free = len(target) - matrix.shape[1]
        if free < 1:
            return found | {name: _keep(name, base, "too few readings") for name in names}
        # Columns to a length of one: bytes and counts of nodes do not go into one matrix well.
        lengths = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
        solution = np.linalg.lstsq(matrix / lengths, target, rcond=1e-9)[0] / lengths
        noise = float(np.sqrt(np.square(target - matrix @ solution).sum() / free))
        doubts: dict[str, float] = {}
        for at, name in enumerate(names):
            value, error = float(solution[at]), _error(matrix / lengths, at, noise) / float(lengths[at])
            found[name] = _believed(
                Finding(name=name, value=value, default=float(getattr(base, name)), error=error), base
            )
            if found[name].kept:
                doubts[name] = error / max(abs(value), 1e-300)
        if not doubts:
            break
        worst = max(doubts, key=lambda name: doubts[name])
        target = target - left.pop(worst) * found[worst].value
    return found


def _error(matrix: NDArray[np.float64], at: int, noise: float) -> float:
    """Standard error of one coefficient: the noise over what of its column no other column explains."""
    others = np.delete(matrix, at, axis=1)
    own = matrix[:, at] - others @ np.linalg.lstsq(others, matrix[:, at], rcond=1e-9)[0]
    length = float(np.linalg.norm(own))
    return noise / length if length > 1e-6 else float("inf")


def _upper(name: str, values: Sequence[int], base: MemoryCoefficients) -> Finding:
    """The third quartile, with half the range as its error: a prediction a little over costs less than one under the
    truth."""
    default = float(getattr(base, name))
    if len(values) < 2:
        return _keep(name, base, "too few readings")
    return _believed(
        Finding(
            name=name,
            value=statistics.quantiles(values, n=4)[2],
            default=default,
            error=(max(values) - min(values)) / 2,
        ),
        base,
    )


def _believed(finding: Finding, base: MemoryCoefficients) -> Finding:
    """The finding, or the default where it is too uncertain or too far from it."""
    said = f"the readings say {finding.value:.4g}"
    if not finding.value > 0 or finding.error > _WORST_ERROR_SHARE * finding.value:
        return _keep(finding.name, base, f"{said} ± {finding.error:.2g}")
    if not finding.default / _WORST_FACTOR <= finding.value <= finding.default * _WORST_FACTOR:
        return _keep(finding.name, base, f"{said}, too far from it to be believed")
    return finding


def _keep(name: str, base: MemoryCoefficients, why: str) -> Finding:
    default = float(getattr(base, name))
    return Finding(name=name, value=default, default=default, kept=why)


def _zero(base: MemoryCoefficients) -> MemoryCoefficients:
    """Coefficients under which only what they do not scale is left."""
    return dataclasses.replace(
        base,
        **{
            field.name: type(value)(0)
            for field in dataclasses.fields(base)
            if not isinstance(value := getattr(base, field.name), str)
        },
    )


def _packed_bytes(workload: Workload, scale_copies: float) -> int:
    """Heap that the multiplied weights take; `scale_copies` as for `heap_bytes`."""
    return sum(
        unit.form.heap_bytes(unit.rows, unit.cols, scale_copies) for unit in workload.units if unit.kind != "embedding"
    )


def _freed_bytes(workload: Workload, coefficients: MemoryCoefficients) -> int:
    return workload.geometry.tokenizer_entries * coefficients.tokenizer_freed_bytes_per_entry


def _context_bytes(workload: Workload, coefficients: MemoryCoefficients) -> int:
    """The cache, and what a chunk holds of it in floats where it is of codes."""
    cache = cache_bytes(workload.geometry, workload.context_tokens, workload.chunk_tokens, coefficients)
    return cache + widened_bytes(workload.geometry, workload.rows, workload.prompt_tokens)


def _run_bytes(workload: Workload, coefficients: MemoryCoefficients) -> int:
    """What a run asks for: its cache and its activations."""
    return _context_bytes(workload, coefficients) + activation_bytes(workload.geometry, workload.rows, coefficients)
