"""From ACIP's order of directions to the options of every unit, in the same map as the curvature method's.

A direction that went while the penalty was λ is worth λ for each element that dropping it saves, so the merged list of
moves by price per byte is ACIP's order. Prices are then scaled, all by one factor, to what the curvature says that the
directions pruned in training cost together; probes and anchors correct them as they do every map.

A unit of rank R is stored as R - a directions and its adapter of rank a, in one pair of factors: nothing is added to
what its bytes say. The adapter was tuned with everything pruned to the stop ratio and is taken in proportion to how
far towards it the order has come; the unpruned model is the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packager.forms.blocks import BlockForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.scoremap.model import Option, Unit
from packager.scoremap.settings import AcipSettings, Kernels
from packager.scoring.acip.gates import OPEN, SCALE, Schedule, shares_along, stored_elements, total_order
from packager.scoring.acip.training import Adapter, Outcome, Start
from packager.scoring.curvature.moments import Curvature
from packager.scoring.factors import low_rank, stored
from packager.scoring.low_rank import Spectrum, decompose
from packager.scoring.rounding import activation_price, feedback, price
from packager.scoring.scored import Scored

_FACTORS = BlockForm(bits=4, block=32, zeros=True)
_WHOLE_8 = BlockForm(bits=8, block=64, zeros=False)
_WHOLE_4 = BlockForm(bits=4, block=64, zeros=True)
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
_QUICK_SHARES = (1.0, 0.7, 0.4)


def start_of(weights: Tensor, curvature: Curvature, basis: str) -> Start:
    """The directions that (N, K) `weights` are taken apart into: those of the curvature, or of the weights alone."""
    ((hessian, gradient),) = curvature.pairs
    weights = weights.float()
    if basis == "curvature":
        spectrum = decompose(weights, hessian, gradient)
        left, right, costs = spectrum.left, spectrum.right, spectrum.costs
    else:
        left, _, _ = torch.linalg.svd(weights, full_matrices=False)
        # Not Σ Vᵀ: what is left of W in the columns as they are stored corrects their rounding.
        right = left.T @ weights
        costs = 0.5 * ((gradient @ left) * left).sum(0) * ((right @ hessian) * right).sum(1)
    return Start(left=left / SCALE**0.5, right=right / SCALE**0.5, costs=costs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """What the options of one unit follow from.

    `directions` (k,) from the last to go to the first; with r of them kept, `nats[r]` is the price and `strength[r]`
    the share of the adapter that is taken, both (k + 1,).
    """

    directions: NDArray[np.int64]
    nats: NDArray[np.float64]
    strength: NDArray[np.float64]
    adapter: Adapter


def rank_units(outcome: Outcome, costs: dict[str, NDArray[np.float64]], settings: AcipSettings) -> dict[str, Ranking]:
    """The ranking of every unit; `costs` are the starts' costs by unit, which give the prices their scale."""
    order = total_order(outcome.fates, Schedule.of(settings), settings.mask_rate * settings.speed)
    shapes = [outcome.fates[name].shape for name in order.names]
    shares = shares_along(order, shapes, settings.adapter_rank)
    pruned = [outcome.fates[name].pruned != OPEN for name in order.names]
    stop = float(shares[sum(int(mask.sum()) for mask in pruned) - 1])
    strength = np.clip((1 - shares) / (1 - stop), 0, 1)
    price_of = [order.levels[order.units == number] * sum(shape) for number, shape in enumerate(shapes)]
    charged = sum(float(prices[: int(mask.sum())].sum()) for prices, mask in zip(price_of, pruned, strict=True))
    known = sum(float(costs[name][mask].sum()) for name, mask in zip(order.names, pruned, strict=True))
    factor = known / charged if charged > 0 and known > 0 else 1.0
    rankings = {}
    for number, name in enumerate(order.names):
        chosen = order.units == number
        rankings[name] = Ranking(
            directions=order.directions[chosen][::-1].copy(),
            nats=np.concatenate([[0.0], np.cumsum(factor * price_of[number])])[::-1].copy(),
            strength=np.concatenate([[0.0], strength[chosen]])[::-1].copy(),
            adapter=outcome.adapters[name],
        )
    return rankings


def ranks_for(unit: Unit, adapter_rank: int, *, quick: bool, low_bit: bool) -> list[int]:
    """The stored ranks worth trying, falling: none with as many elements as the matrix, nor too few for the adapter."""
    most = (unit.elements - 1) // (unit.rows + unit.cols)
    multiple = _FACTORS.block if low_bit else 8 if most >= 64 else 1
    ranks = {int(most * share) // multiple * multiple for share in (_QUICK_SHARES if quick else _SHARES)}
    return sorted((rank for rank in ranks if rank >= max(adapter_rank, 1)), reverse=True)


def forms_ranked(
    unit: Unit, adapter_rank: int, *, quick: bool, kernels: Kernels
) -> list[FloatForm | BlockForm | LowRankForm]:
    """The forms worth trying for a linear unit that was ranked: whole, whole in blocks, and pairs of factors."""
    whole = FloatForm(label=kernels.floats)
    ranks = ranks_for(unit, adapter_rank, quick=quick, low_bit=kernels.low_bit)
    pairs = [LowRankForm(rank=rank, factors=_FACTORS if kernels.low_bit else whole) for rank in ranks]
    return [whole, *((_WHOLE_8, _WHOLE_4) if kernels.low_bit else ()), *pairs]


def ranked_options(
    unit: Unit, weights: Tensor, curvature: Curvature, start: Start, ranking: Ranking, *, quick: bool, kernels: Kernels
) -> Iterator[Scored]:
    """Every option of a linear unit with weights (rows, cols)."""
    weights = weights.float()
    ((hessian, gradient),) = curvature.pairs
    error_feedback = feedback(curvature.rounding)
    adapter = _on(ranking.adapter, weights.device)
    adapter_rank = len(adapter.down)
    for form in forms_ranked(unit, adapter_rank, quick=quick, kernels=kernels):
        match form:
            case FloatForm():
                (values, tensors), wanted, loss = stored(weights, form, error_feedback), weights, 0.0
            case BlockForm():
                # The last step before factors: the adapter is merged as far as the order has come by then.
                merged = form == _WHOLE_4
                wanted = (
                    weights + _last_whole(unit, ranking, adapter_rank) * (adapter.up @ adapter.down)
                    if merged
                    else weights
                )
                values, tensors = stored(wanted, form, error_feedback)
                loss = 0.0
            case LowRankForm(rank=rank):
                kept = rank - adapter_rank
                target = folded(start, ranking.directions[:kept], adapter, float(ranking.strength[kept]))
                wanted = target.left @ target.right
                values, tensors = low_rank(wanted, target, form, error_feedback)
                loss = float(ranking.nats[kept])
            case _:
                assert_never(form)
        if not isinstance(form, FloatForm):
            loss += price(values - wanted, hessian, gradient)
        if kernels.rounds_inputs and (block := form.activation_block) is not None:
            loss += activation_price(weights, curvature.noise[block], gradient)
        size = sum(tensor.nbytes for tensor in tensors.values())
        yield Scored(option=Option(form=form, bytes=size, loss_nats=loss), tensors=tensors)


def folded(start: Start, directions: NDArray[np.int64], adapter: Adapter, strength: float) -> Spectrum:
    """The kept directions and the adapter as one pair of factors: side by side, then taken apart anew into as many
    directions of their own, so that both factors carry the same weight."""
    chosen = torch.from_numpy(np.ascontiguousarray(directions)).to(start.left.device)
    left = torch.cat([start.left[:, chosen] * SCALE, strength * adapter.up], dim=1)
    right = torch.cat([start.right[chosen], adapter.down])
    tall, outer = torch.linalg.qr(left)
    wide, inner = torch.linalg.qr(right.T)
    u, sigma, v = torch.linalg.svd(outer @ inner.T)
    balance = sigma.sqrt()
    return Spectrum(left=tall @ (u * balance), right=(balance[:, None] * v) @ wide.T, costs=sigma)


def _last_whole(unit: Unit, ranking: Ranking, adapter_rank: int) -> float:
    """The adapter's strength where the unit has as few directions as it can have and yet be no smaller in factors."""
    shape = (unit.rows, unit.cols)
    whole = [
        rank for rank in range(len(ranking.strength)) if stored_elements(shape, rank + adapter_rank) == unit.elements
    ]
    return float(ranking.strength[whole[0]])


def _on(adapter: Adapter, device: torch.device) -> Adapter:
    return Adapter(up=adapter.up.to(device), down=adapter.down.to(device))
