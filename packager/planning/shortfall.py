"""Why nothing fits, and what would: the smallest model's memory stacked term by term against the budget.

Every remedy is worked out with the same memory model that found the shortfall, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from packager.errors import ArtifactError
from packager.memory.model import MemoryEstimate
from packager.planning import contexts
from packager.profile import DeviceProfile
from packager.sizes import format_size

Smallest = Callable[[DeviceProfile, int], MemoryEstimate]
"""Memory of the smallest model of a map on a device at a context. ArtifactError where the device runs none of the map's
forms."""

MARGIN_TEXT = "margin, since nothing is measured"
_BAR = 40
_NAMES = 28  # columns for the names of the terms, at least
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One term of the smallest model's peak, and how much of it lies beyond the budget when the terms are stacked in
    order."""

    name: str
    bytes: int
    beyond_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """`arguments` for the command line with which the smallest model fits: it then needs `peak_bytes` of
    `budget_bytes`."""

    arguments: str
    reason: str
    peak_bytes: int
    budget_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortfall:
    """A budget that even the smallest model exceeds. The terms' `beyond_bytes` sum up to the deficit."""

    profile: str
    budget_bytes: int
    minimum_bytes: int
    context_tokens: int
    phase: str
    terms: tuple[Term, ...]
    remedies: tuple[Remedy, ...]
    margin_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, bytes throughout."""
        return asdict(self)

    def text(self) -> str:
        """One line that says it, the terms as a table with a bar that runs past the budget, and what would fit."""
        width = max(_NAMES, *(len(term.name) for term in self.terms))
        lines = [
            f"{format_size(self.budget_bytes)} is too little: the smallest model of this map needs "
            f"{format_size(self.minimum_bytes)} on {self.profile} at a "
            f"context of {self.context_tokens} tokens, {format_size(self.minimum_bytes - self.budget_bytes)} more",
            f"  {f'at its peak, in {self.phase}':{width}} {'needs':>10} {'too much':>10}",
        ]
        start = 0
        for term in self.terms:
            beyond = format_size(term.beyond_bytes) if term.beyond_bytes else "-"
            row = f"  {term.name:{width}} {format_size(term.bytes):>10} {beyond:>10}"
            lines.append(f"{row}  {self._bar(start, start + term.bytes)}".rstrip())
            start += term.bytes
        lines.append(
            f"  {'together':{width}} {format_size(self.minimum_bytes):>10} "
            f"{format_size(self.minimum_bytes - self.budget_bytes):>10}"
        )
        lines.append(
            "what would fit:"
            if self.remedies
            else "nothing would fit: no shorter context, no smaller cache, no budget on this device, no shipped profile"
        )
        lines += [
            f"  {item.arguments:30} {item.reason}; needs {format_size(item.peak_bytes)} of "
            f"{format_size(item.budget_bytes)}"
            for item in self.remedies
        ]
        if self.margin_bytes > 0 and self.minimum_bytes - self.margin_bytes <= self.budget_bytes:
            lines.append(within_error_text(self.margin_bytes) + "; a build that validates measures and keeps no margin")
        if self.remedies and not any(item.arguments.startswith("--context") for item in self.remedies):
            lines.append("no context is short enough for this budget")
        return "\n".join(lines)

    def _bar(self, start: int, end: int) -> str:
        """From `start` to `end` bytes on one scale for all terms: what lies beyond the budget is hatched."""
        first, last, limit = (round(_BAR * max(0, at) / self.minimum_bytes) for at in (start, end, self.budget_bytes))
        return " " * first + "".join("█" if at < limit else "▒" for at in range(first, last))


def within_error_text(margin_bytes: int) -> str:
    """What to say of a budget that is nearer to the smallest model's need than predictions are exact."""
    return (
        f"the budget is within the prediction's error ({format_size(margin_bytes)}) of the smallest model's need: it "
        "may turn out too little"
    )


def explain(
    profile: DeviceProfile,
    *,
    budget_bytes: int,
    context_tokens: int,
    shortest_tokens: int,
    reserve_bytes: int,
    smallest: Smallest,
    others: Sequence[DeviceProfile],
    margin_bytes: int = 0,
    coded: Smallest | None = None,
) -> Shortfall:
    """What is missing at `context_tokens`, and what would do: a context down to `shortest_tokens`, a cache of 8-bit
    codes, a budget, one of `others`. `coded` is `smallest` with such a cache, where there is one and it was not planned
    with.
    """
    estimate = smallest(profile, context_tokens)
    items = [(item.name, item.bytes) for item in estimate.items]
    if reserve_bytes:
        items.append(("measured above the prediction before", reserve_bytes))
    if margin_bytes:
        items.append((MARGIN_TEXT, margin_bytes))
    spare = reserve_bytes + margin_bytes
    terms, start = [], 0
    for name, size in items:
        beyond = max(0, start + size - budget_bytes) - max(0, start - budget_bytes)
        terms.append(Term(name=name, bytes=size, beyond_bytes=beyond))
        start += size

    def needed(tokens: int) -> int:
        return smallest(profile, tokens).peak_bytes + spare

    remedies = []
    shorter = contexts.longest(lambda tokens: needed(tokens) <= budget_bytes, shortest_tokens, context_tokens - 1)
    if shorter is not None:
        remedies.append(
            Remedy(
                arguments=f"--context {shorter}",
                reason="the longest context that fits",
                peak_bytes=needed(shorter),
                budget_bytes=budget_bytes,
            )
        )
    if coded is not None and (peak := coded(profile, context_tokens).peak_bytes + spare) <= budget_bytes:
        remedies.append(
            Remedy(
                arguments="--kv-cache int8",
                reason="a key/value cache of 8-bit codes",
                peak_bytes=peak,
                budget_bytes=budget_bytes,
            )
        )
    enough = -(-start // _MIB) * _MIB
    if enough <= profile.memory_bytes:
        remedies.append(
            Remedy(
                arguments=f"--budget {enough // _MIB}MiB",
                reason="the least budget that fits, in whole MiB",
                peak_bytes=start,
                budget_bytes=enough,
            )
        )
    remedies += _next_profile(profile, context_tokens, smallest, others, margin_bytes)
    return Shortfall(
        profile=profile.name,
        budget_bytes=budget_bytes,
        minimum_bytes=start,
        context_tokens=context_tokens,
        phase=estimate.peak_phase,
        terms=tuple(terms),
        remedies=tuple(remedies),
        margin_bytes=margin_bytes,
    )


def _next_profile(
    profile: DeviceProfile,
    context_tokens: int,
    smallest: Smallest,
    others: Sequence[DeviceProfile],
    margin_bytes: int,
) -> list[Remedy]:
    """The device of the least budget, its own, in which the smallest model fits at the same context; none or one.

    It has all the kernels of the one asked for, so that it is not larger only because its weights are floats.
    """
    for other in sorted(others, key=lambda item: (item.budget_bytes, item.name)):
        if other.name == profile.name or other.provider != profile.provider or not set(profile.bits) <= set(other.bits):
            continue
        try:
            peak = smallest(other, context_tokens).peak_bytes + margin_bytes
        except ArtifactError:  # none of the map's forms runs there
            continue
        if peak <= other.budget_bytes:
            return [
                Remedy(
                    arguments=f"--profile {other.name}",
                    reason="the next larger shipped profile that fits",
                    peak_bytes=peak,
                    budget_bytes=other.budget_bytes,
                )
            ]
    return []
