"""The maths of ACIP's gates: what opens and shuts a singular direction, and the one order in which all of them go.

Genzel, Putzky et al., "Choose Your Model Size: Any Compression of Large Language Models Without Re-Computation"
(arXiv 2502.01717). A direction's mask μ starts at c; its gate lets c through while μ > 0 and nothing from then on. The
penalty λ Σ relu(μ) pulls every open mask down at a rate that grows; what the loss does not hold up goes first.

Nothing here knows a model. A unit is (rows, cols) = (m, n) with k = min(m, n) directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packager.scoremap.settings import AcipSettings

SCALE = 0.02
"""c: what an open gate lets through, and where masks start. The factors carry c to the power of -1 between them."""
OPEN = -1
"""The step of a direction that was never pruned."""


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        alive = mask > 0
        ctx.save_for_backward(alive)
        return alive.to(mask.dtype) * SCALE

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        alive: Tensor = ctx.saved_tensors[0]
        return gradients[0] * alive


def gate(mask: Tensor) -> Tensor:
    """c where the mask is above zero, else 0; the gradient is that of relu, so that a shut gate stays shut."""
    result: Tensor = _Gate.apply(mask)  # type: ignore[no-untyped-call]  # torch's own stub
    return result


def penalty(masks: Sequence[Tensor]) -> Tensor:
    """Σ relu(μ) in float32: one-sided on purpose, for below zero there is nothing left to win."""
    return torch.stack([mask.float().relu().sum() for mask in masks]).sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """λ at step t: `first` · `growth`^(t · `speed` / `every`), in whole powers while it trains."""

    first: float
    growth: float
    every: int
    speed: float

    @classmethod
    def of(cls, settings: AcipSettings) -> Schedule:
        """The schedule that the settings ask for."""
        return cls(
            first=settings.first_penalty, growth=settings.growth, every=settings.growth_every, speed=settings.speed
        )

    def at(self, step: int) -> float:
        """λ of an optimiser step, counted from 0."""
        return float(self.first * self.growth ** int(step * self.speed / self.every))

    def between(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """λ at fractions of steps, without its stairs."""
        return self.first * self.growth ** (steps * self.speed / self.every)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fate:
    """What became of a unit's k directions: `mask` at the end, the step that `pruned` each (OPEN: none), and the
    mask right after that step (`fell_to`). `shape` is the unit's (rows, cols)."""

    shape: tuple[int, int]
    mask: NDArray[np.float32]
    pruned: NDArray[np.int32]
    fell_to: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """All directions of all units, the first to go first: number of the unit in `names`, and of the direction in it.

    `levels` are the λ that each was worth: that of the step which pruned it, or of the step at which an open mask would
    reach zero. They never fall.
    """

    names: tuple[str, ...]
    units: NDArray[np.int64]
    directions: NDArray[np.int64]
    levels: NDArray[np.float64]


def total_order(fates: Mapping[str, Fate], schedule: Schedule, mask_rate: float) -> Order:
    """One order over everything: by the step that pruned it, by how low it then fell, by unit, by index from the last.

    Open directions come after all pruned ones, by magnitude; `mask_rate` per step says when they would have gone.
    """
    names = tuple(sorted(fates))
    units = np.concatenate([np.full(len(fates[name].mask), number) for number, name in enumerate(names)])
    directions = np.concatenate([np.arange(len(fates[name].mask)) for name in names])
    mask, pruned, fell_to = (
        np.concatenate([getattr(fates[name], field) for name in names]) for field in ("mask", "pruned", "fell_to")
    )
    alive = pruned == OPEN
    last = int(pruned.max(initial=0)) + 1
    steps = np.where(alive, last, pruned)
    heights = np.where(alive, mask, fell_to).astype(np.float64)
    order = np.lexsort((-directions, units, heights, steps))
    # Those that one step pruned are spread over it in their order.
    sorted_steps = steps[order]
    first, count = (np.searchsorted(sorted_steps, sorted_steps, side=side) for side in ("left", "right"))
    within = (np.arange(len(order)) - first) / (count - first)
    times = np.where(alive[order], last + heights[order] / mask_rate, sorted_steps + within)
    return Order(names=names, units=units[order], directions=directions[order], levels=schedule.between(times))


def stored_elements(shape: tuple[int, int], rank: int) -> int:
    """min(m n, r (m + n)): a matrix is kept whole where its factors are no smaller."""
    rows, cols = shape
    return min(rows * cols, rank * (rows + cols))


def kept_share(shapes: Sequence[tuple[int, int]], ranks: Sequence[int], adapter_rank: int) -> float:
    """Elements stored for matrices of `ranks`, each with its adapter of `adapter_rank` folded in, over all elements."""
    kept = sum(stored_elements(shape, rank + adapter_rank) for shape, rank in zip(shapes, ranks, strict=True))
    return kept / sum(rows * cols for rows, cols in shapes)


def shares_along(order: Order, shapes: Sequence[tuple[int, int]], adapter_rank: int) -> NDArray[np.float64]:
    """The kept share after each direction of the order went; `shapes` are of the order's units, in its names' order."""
    savings = np.empty(len(order.units), np.int64)
    for number, shape in enumerate(shapes):
        stored = [stored_elements(shape, rank + adapter_rank) for rank in range(min(shape), -1, -1)]
        savings[order.units == number] = -np.diff(stored)
    whole = sum(rows * cols for rows, cols in shapes)
    shares: NDArray[np.float64] = 1.0 - np.cumsum(savings) / whole
    return shares
