"""A sweep over sizes: from the smallest model of a map to the largest, what each costs, predicted and measured.

Sizes grow by equal ratios: of an even spacing most would lie where nothing is lost any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packager.errors import InfeasibleBudgetError, UsageError
from packager.planning.plan import Plan, Request, plan_file_bytes, runnable
from packager.planning.solver import choice_at, total_bytes
from packager.planning.target import Target
from packager.profile import DeviceProfile
from packager.scoremap.opening import OpenedMap

LEAST_SIZES = 2
BY_FILE, BY_PEAK = "weights file", "peak memory"
MOST_NOISE = 3.0
"""Standard errors by which a larger size may measure worse: of 29 pairs of equals, chance alone exceeds it in one sweep
of 26."""
_BLOCK_TOKENS = 64

Nats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The rise of the loss over the source model, and its standard error, in nats per token.

    `step_nats` is what the size costs more than the next larger one that was measured, None for the largest;
    `step_noise_nats` is the standard error of that paired difference.
    """

    rise_nats: float
    noise_nats: float
    step_nats: float | None
    step_noise_nats: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SizePoint:
    """One size: `limit_bytes` was asked for, of the file or of the process; the rest is its plan's."""

    limit_bytes: int
    file_bytes: int
    bits_per_weight: float
    peak_bytes: int
    predicted_nats: float
    measured: Measured | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What the sizes were measured on. `monotone`: no size measures better than the next larger one by more than
    MOST_NOISE standard errors of their paired difference."""

    text: str
    windows: int
    tokens: int
    source_nats: float
    monotone: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A sweep of a map. `bounded` says what the sizes bound: bytes of the weights file, or peak memory of the
    process."""

    map_sha256: str
    model: str
    bounded: str
    profile: str
    context_tokens: int
    points: tuple[SizePoint, ...]
    measurement: Measurement | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def predict(opened: OpenedMap, request: Request, count: int, *, by_peak: bool) -> tuple[Curve, list[Plan]]:
    """The curve of `count` sizes as it is predicted, and the plan of each; needs no model and no runtime.

    Fewer sizes where the map has no more. Raises UsageError for fewer than two, InfeasibleBudgetError when the device
    fits none.
    """
    plans = _distinct(_by_peak(opened, request, count) if by_peak else _by_file(opened, request.profile, count))
    elements = sum(unit.elements for unit in opened.scoremap.units)
    points = [
        SizePoint(
            limit_bytes=limit,
            file_bytes=plan.file_bytes,
            bits_per_weight=8 * plan.file_bytes / elements,
            peak_bytes=plan.peak_bytes,
            predicted_nats=plan.loss_nats,
            measured=None,
        )
        for limit, plan in plans
    ]
    curve = Curve(
        map_sha256=opened.sha256,
        model=opened.identity.model.name,
        bounded=BY_PEAK if by_peak else BY_FILE,
        profile=request.profile.name,
        context_tokens=plans[0][1].context_tokens,
        points=tuple(points),
        measurement=None,
    )
    return curve, [plan for _, plan in plans]


def _by_file(opened: OpenedMap, profile: DeviceProfile, count: int) -> Iterator[tuple[int, Plan]]:
    view = runnable(opened.scoremap, profile)
    least, most = (total_bytes(view, choice_at(view, prefix)) for prefix in (len(view.moves), 0))
    for limit in _spread(least, most, count):
        yield limit, plan_file_bytes(opened, profile, limit)


def _by_peak(opened: OpenedMap, request: Request, count: int) -> Iterator[tuple[int, Plan]]:
    """From the least budget that the map fits to the most that it can use of the device's memory."""

    def plan(budget: int) -> Plan:
        return replace(request, budget_bytes=budget, target=Target(fill=True)).plan(opened)

    largest = plan(request.profile.memory_bytes)
    try:
        smallest = plan(1)
    except InfeasibleBudgetError as error:
        smallest = plan(error.minimum_bytes)
    # What every size needs alike is left out of the ratios.
    fixed = smallest.peak_bytes - smallest.file_bytes
    for size in _spread(smallest.peak_bytes - fixed, largest.peak_bytes - fixed, count):
        yield size + fixed, plan(size + fixed)


def _spread(least: int, most: int, count: int) -> list[int]:
    """`count` sizes from `least` to `most` by equal ratios."""
    if count < LEAST_SIZES:
        raise UsageError(f"{count} sizes make no curve: expected at least {LEAST_SIZES}")
    inner = [round(least * math.exp(math.log(most / least) * step / (count - 1))) for step in range(1, count - 1)]
    return [least, *inner, most]


def _distinct(sizes: Iterable[tuple[int, Plan]]) -> list[tuple[int, Plan]]:
    """Without those that equal the one before: a small map has fewer sizes than were asked for."""
    kept: list[tuple[int, Plan]] = []
    for limit, plan in sizes:
        if not kept or plan.choices != kept[-1][1].choices:
            kept.append((limit, plan))
    return kept


def evenly(count: int, total: int) -> list[int]:
    """`count` of `total` positions, both ends among them, as evenly as they go."""
    if count < LEAST_SIZES:
        raise UsageError(f"{count} sizes make no curve: expected at least {LEAST_SIZES}")
    return sorted({round(step * (total - 1) / (count - 1)) for step in range(count)})


def standard_error(samples: Nats) -> float:
    """Standard error of the mean of (n,) independent samples; not a number for fewer than two."""
    return float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else math.nan


def measured_curve(curve: Curve, text: str, source: Nats, losses: Mapping[int, Nats]) -> Curve:
    """`curve` with what its points (by position) measured.

    `source` and each of `losses` (windows, tokens) are losses of the same tokens in nats, of the source model and of
    the size. Errors are over blocks of 64 tokens, for neighbouring tokens' losses go together.
    """
    points, larger, monotone = list(curve.points), None, True
    for position in sorted(losses, reverse=True):
        rise = blocks(losses[position] - source)
        step = blocks(losses[position] - larger) if larger is not None else None
        measured = Measured(
            rise_nats=float((losses[position] - source).mean()),
            noise_nats=standard_error(rise),
            step_nats=None if larger is None else float((losses[position] - larger).mean()),
            step_noise_nats=None if step is None else standard_error(step),
        )
        if measured.step_nats is not None and measured.step_noise_nats is not None:
            monotone = monotone and measured.step_nats >= -MOST_NOISE * measured.step_noise_nats
        points[position], larger = replace(points[position], measured=measured), losses[position]
    measurement = Measurement(
        text=text, windows=len(source), tokens=source.size, source_nats=float(source.mean()), monotone=monotone
    )
    return replace(curve, points=tuple(points), measurement=measurement)


def blocks(differences: Nats) -> Nats:
    """Means of whole blocks of 64 tokens, in a row, of any differences in nats; of halves where there is but one."""
    flat = differences.reshape(-1)
    width = min(_BLOCK_TOKENS, len(flat) // 2)
    means: Nats = flat[: len(flat) // width * width].reshape(-1, width).mean(axis=1)
    return means
