"""The options of one unit: every form it could take, made, packed and priced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packager.forms import BlockForm, FloatForm, Form, LowRankForm, SumForm, parse_form
from packager.graph.packing import pack_blocks
from packager.scoremap import Option, Unit
from packager.scoring.curvature import Curvature
from packager.scoring.lowrank import Spectrum, decompose, refit_left
from packager.scoring.rounding import Rounded, gptq, inverse_factor, price, refit_scales, values

Arrays = dict[str, NDArray[np.generic]]

LINEAR_FORMS = (
    *("q8g64", "q8g128", "q8g256"),
    *("q4g64z+q2g64", "q4g128z+q2g128"),
    *("q4g32z", "q4g64z", "q4g64", "q4g128z", "q4g128"),
    *("q2g64", "q2g64z", "q2g128z"),
)
VOCABULARY_FORMS = ("q8g64", "q8g128", "q8g256", "q4g32z", "q4g64z", "q4g64", "q4g128z")
QUICK_LINEAR_FORMS = ("q8g64", "q4g64z+q2g64", "q4g64z", "q2g64")
QUICK_VOCABULARY_FORMS = ("q8g64", "q4g64z")
_MOST_PADDING = 1.06
_FACTORS = BlockForm(bits=4, block=32, zeros=True)
_RANK_SHARES = (0.25, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An option and its packed tensors."""

    option: Option
    tensors: Arrays


def forms_for(unit: Unit, *, quick: bool) -> list[Form]:
    """The forms worth trying for a unit. Blocks longer than a row only pad; the head is never at 2 bits."""
    if unit.kind == "linear":
        labels: Sequence[str] = QUICK_LINEAR_FORMS if quick else LINEAR_FORMS
    else:
        labels = QUICK_VOCABULARY_FORMS if quick else VOCABULARY_FORMS
    forms: list[Form] = [FloatForm(label="f32")]
    forms += [form for form in (parse_form(label) for label in labels) if _fits(form, unit.cols)]
    if unit.kind == "linear" and not quick:
        ranks = {int(min(unit.rows, unit.cols) * share) // _FACTORS.block * _FACTORS.block for share in _RANK_SHARES}
        forms += [LowRankForm(rank=rank, factors=_FACTORS) for rank in sorted(ranks) if rank >= _FACTORS.block]
    return forms


def _fits(form: Form, cols: int) -> bool:
    """Whether rows of `cols` fill the form's blocks: padding costs bytes and wins nothing. The narrow ones always may."""
    match form:
        case BlockForm(block=block):
            return block <= 64 or form.blocks(cols) * block <= _MOST_PADDING * cols
        case SumForm(first=first, second=second):
            return _fits(first, cols) and _fits(second, cols)
    return True


def score_unit(unit: Unit, weights: Tensor, curvature: Curvature, *, quick: bool) -> Iterator[Scored]:
    """Every option of a unit with weights (rows, cols)."""
    weights = weights.float()
    hessian = _joint_hessian(curvature)
    factor = inverse_factor(hessian)
    importance = hessian.diagonal()
    spectrum: Spectrum | None = None
    tensors: Arrays
    for form in forms_for(unit, quick=quick):
        match form:
            case FloatForm():
                approximation, tensors = weights, {"weight": weights.cpu().numpy().astype(np.float32)}
            case BlockForm():
                rounded = refit_scales(weights, gptq(weights, factor, importance, form), hessian, form)
                approximation, tensors = values(rounded, form), _packed(rounded, form)
            case SumForm(first=first, second=second):
                coarse = refit_scales(weights, gptq(weights, factor, importance, first), hessian, first)
                left = weights - values(coarse, first)
                fine = refit_scales(left, gptq(left, factor, importance, second), hessian, second)
                approximation = values(coarse, first) + values(fine, second)
                tensors = _prefixed("first", _packed(coarse, first)) | _prefixed("second", _packed(fine, second))
            case LowRankForm():
                spectrum = spectrum or decompose(weights, *curvature.pairs[0])
                approximation, tensors = _low_rank(weights, spectrum, form, hessian)
        error = approximation - weights
        loss = 0.0 if isinstance(form, FloatForm) else sum(price(error, h, g) for h, g in curvature.pairs)
        size = sum(tensor.nbytes for tensor in tensors.values())
        yield Scored(option=Option(form=form, bytes=size, loss_nats=loss), tensors=tensors)


def _joint_hessian(curvature: Curvature) -> Tensor:
    """The H that rounding works with. A tied unit's two are added, each with the total weight of its rows."""
    if len(curvature.pairs) == 1:
        return curvature.pairs[0][0]
    return torch.stack([hessian * gradient.sum() for hessian, gradient in curvature.pairs]).sum(0)


def _packed(rounded: Rounded, form: BlockForm) -> Arrays:
    zeros = rounded.zeros.cpu().numpy() if rounded.zeros is not None else None
    return pack_blocks(form, rounded.codes.cpu().numpy(), rounded.scales.cpu().numpy(), zeros)


def _prefixed(prefix: str, tensors: Arrays) -> Arrays:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _low_rank(weights: Tensor, spectrum: Spectrum, form: LowRankForm, hessian: Tensor) -> tuple[Tensor, Arrays]:
    """Truncate, round the right factor under H, refit the left to it, round the left under what it then reads."""
    right = spectrum.right[: form.rank]
    rounded_right = refit_scales(right, gptq(right, inverse_factor(hessian), hessian.diagonal(), form.factors), hessian, form.factors)
    down = values(rounded_right, form.factors)
    left = refit_left(weights, down, hessian)
    inner = down @ hessian @ down.T
    rounded_left = refit_scales(left, gptq(left, inverse_factor(inner), inner.diagonal(), form.factors), inner, form.factors)
    tensors = _prefixed("down", _packed(rounded_right, form.factors)) | _prefixed("up", _packed(rounded_left, form.factors))
    return values(rounded_left, form.factors) @ down, tensors
