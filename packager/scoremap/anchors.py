"""From summed prices to the rise of the loss that was measured: a monotone curve through a map's anchors.

Prices add up; real losses interact below about four bits. The map stores a few prefixes with their summed price and
their measured rise, and predictions are read off the line through them in logarithms of both.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """Summed price of a prefix, and what it measured, both in nats per token."""

    priced_nats: float
    measured_nats: float


def monotone(anchors: Sequence[Anchor]) -> tuple[Anchor, ...]:
    """Anchors in rising order of both; a measurement below an earlier one (noise) is left out."""
    kept: list[Anchor] = []
    for anchor in sorted(anchors, key=lambda item: item.priced_nats):
        if (
            anchor.priced_nats > 0
            and anchor.measured_nats > 0
            and (not kept or anchor.measured_nats > kept[-1].measured_nats)
        ):
            kept.append(anchor)
    return tuple(kept)


def predicted_nats(anchors: Sequence[Anchor], priced_nats: float) -> float:
    """The rise of the loss expected at a summed price: interpolated in logarithms, the end's ratio kept outside."""
    if priced_nats <= 0 or not anchors:
        return max(0.0, priced_nats)
    at = bisect.bisect_left([anchor.priced_nats for anchor in anchors], priced_nats)
    if at == 0 or at == len(anchors):
        end = anchors[0] if at == 0 else anchors[-1]
        return priced_nats * end.measured_nats / end.priced_nats
    low, high = anchors[at - 1], anchors[at]
    share = math.log(priced_nats / low.priced_nats) / math.log(high.priced_nats / low.priced_nats)
    return math.exp((1 - share) * math.log(low.measured_nats) + share * math.log(high.measured_nats))
