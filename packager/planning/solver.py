"""Which options to take: the shortest prefix of the map's moves that fits.

Pure functions over a score map. The map's `bytes` are of whatever resource is bounded: file bytes as scored, or
resident bytes after `scoremap.reweighed`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from packager.scoremap.model import ScoreMap

Fits = Callable[[Sequence[int]], bool]
"""Whether a choice (the option number of every unit) fits. What fits must still fit after any further move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """`choice[u]` is the option number of unit u, after the first `prefix` moves and the one step that leftover bytes
    took back."""

    choice: tuple[int, ...]
    prefix: int


def choice_at(scoremap: ScoreMap, prefix: int) -> list[int]:
    """The option number of every unit after the first `prefix` moves."""
    choice = [0] * len(scoremap.units)
    for move in scoremap.moves[:prefix]:
        choice[move.unit] = move.option
    return choice


def solve(scoremap: ScoreMap, fits: Fits) -> Solution | None:
    """The shortest prefix that fits, or None when even the longest does not.

    Bytes left over then undo the one step that wins the most loss among those that still fit. One and not several,
    so that predicted loss stays monotone over budgets: prefixes lie on the lower convex envelope of all choices, so
    no smaller total beats a prefix, and within one prefix a larger leftover only adds candidates.
    """
    prefix = bisect.bisect_left(
        range(len(scoremap.moves) + 1), True, key=lambda count: fits(choice_at(scoremap, count))
    )
    if prefix > len(scoremap.moves):
        return None
    choice = choice_at(scoremap, prefix)
    undone = _best_undo(scoremap, choice, fits)
    if undone is not None:
        choice[undone] -= 1
    return Solution(choice=tuple(choice), prefix=prefix)


def _best_undo(scoremap: ScoreMap, choice: list[int], fits: Fits) -> int | None:
    gains = []
    for unit, taken in enumerate(choice):
        if taken:
            chain = scoremap.options[unit]
            gains.append((chain[taken - 1].loss_nats - chain[taken].loss_nats, scoremap.units[unit].name, unit))
    for _, _, unit in sorted(gains):
        if fits([taken - (number == unit) for number, taken in enumerate(choice)]):
            return unit
    return None


def total_loss(scoremap: ScoreMap, choice: Sequence[int]) -> float:
    """Predicted rise of the loss in nats per token."""
    return sum(chain[taken].loss_nats for chain, taken in zip(scoremap.options, choice, strict=True))


def total_bytes(scoremap: ScoreMap, choice: Sequence[int]) -> int:
    """Bytes of the chosen options."""
    return sum(chain[taken].bytes for chain, taken in zip(scoremap.options, choice, strict=True))
