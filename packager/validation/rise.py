"""The verdict on the rise of the loss over the source model, measured on the runtime against what the plan predicted.

The golden outputs hold a bundle against a reference made of the same weights: weights that are themselves wrong (of
another model, of a damaged map) agree with it. Only the source model's own losses, which the map stored, tell.
"""

from __future__ import annotations

import math

import numpy as np

from packager.planning.size_curve import MOST_NOISE, Nats, blocks, standard_error
from packager.validation.report import Check, number

NAME = "rise of the loss over the source, measured"
LEAST_MARGIN = 0.05
"""Nats per token by which a measured rise may be larger than the predicted one."""
MARGIN_SHARE = 0.5
"""The same as a share of the predicted rise, where that is more: large rises are predicted less well."""


def rise_check(source: Nats, found: Nats, predicted: float) -> Check:
    """Hold the mean of `found` - `source`, losses in nats of the same held-out tokens (windows, tokens), against the
    `predicted` rise.

    It fails where it is larger by more than LEAST_MARGIN or MARGIN_SHARE of the predicted rise, whichever is more, and
    three of its standard errors. A smaller one never fails: a polished bundle's prediction is an upper bound.
    """
    differences = found - source
    if not np.isfinite(differences).all():
        return Check(name=NAME, value=number(math.nan), limit=predicted, unit="nats/token", passed=False)
    rise, noise = float(differences.mean()), standard_error(blocks(differences))
    limit = predicted + max(LEAST_MARGIN, MARGIN_SHARE * predicted) + MOST_NOISE * noise
    return Check(
        name=NAME,
        value=rise,
        limit=limit,
        unit=f"nats/token; predicted {predicted:.4f}, standard error {noise:.4f}",
        passed=rise <= limit,
    )
