"""The options of one unit: every form it could take, made, packed and priced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

from torch import Tensor

from packager.forms.blocks import BlockForm
from packager.forms.codes import CodesForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import Form, parse_form
from packager.scoremap.model import Option, Unit
from packager.scoremap.settings import Kernels
from packager.scoring.curvature.moments import Curvature
from packager.scoring.factors import low_rank, pivoted, stored
from packager.scoring.low_rank import Spectrum, decompose
from packager.scoring.rounding import activation_price, feedback, packed, price, round_to, values
from packager.scoring.scored import Arrays, Scored

LINEAR_FORMS = (
    *("q8g32", "q8g64", "q8g128"),
    *("q6g64", "q6g128"),
    *("q4g32z", "q4g64z", "q4g64", "q4g128z", "q4g128"),
    *("q2g64", "q2g128z"),
)
VOCABULARY_FORMS = ("q8g64", "q8g128", "q6g64", "q6g128", "q4g32z", "q4g64z", "q4g64", "q4g128z")
QUICK_LINEAR_FORMS = ("q8g64", "q6g64", "q4g64z", "q2g64")
QUICK_VOCABULARY_FORMS = ("q8g64", "q4g64z")
_FACTORS = BlockForm(bits=4, block=32, zeros=True)
_RANK_SHARES = (0.25,)
_PIVOT_SHARES = (0.25, 0.5)
_FLOAT_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_QUICK_FLOAT_SHARES = (0.25, 0.5, 0.75)


ALL_KERNELS = Kernels()


def forms_for(unit: Unit, *, quick: bool, kernels: Kernels = ALL_KERNELS) -> list[Form]:
    """The forms worth trying for a unit. Blocks longer than a row only pad; the head is never at 2 bits."""
    whole = FloatForm(label=kernels.floats)
    if not kernels.low_bit:
        shares = () if unit.kind != "linear" else _QUICK_FLOAT_SHARES if quick else _FLOAT_SHARES
        return [
            whole,
            *(
                PivotForm(rank=rank, factors=whole)
                for rank in _ranks(unit, shares, 8 if min(unit.rows, unit.cols) >= 64 else 1)
            ),
        ]
    if unit.kind == "linear":
        labels: Sequence[str] = QUICK_LINEAR_FORMS if quick else LINEAR_FORMS
    else:
        labels = QUICK_VOCABULARY_FORMS if quick else VOCABULARY_FORMS
    forms: list[Form] = [whole]
    forms += [form for form in (parse_form(label) for label in labels) if form.fills(unit.cols)]
    if unit.kind == "linear" and not quick:
        forms += [LowRankForm(rank=rank, factors=_FACTORS) for rank in _ranks(unit, _RANK_SHARES, _FACTORS.block)]
        forms += [PivotForm(rank=rank, factors=_FACTORS) for rank in _ranks(unit, _PIVOT_SHARES, _FACTORS.block)]
    return forms


def _ranks(unit: Unit, shares: Sequence[float], multiple: int) -> list[int]:
    """The multiples of `multiple` at shares of the full rank, rising."""
    ranks = {int(min(unit.rows, unit.cols) * share) // multiple * multiple for share in shares}
    return sorted(rank for rank in ranks if rank)


def score_unit(
    unit: Unit, weights: Tensor, curvature: Curvature, *, quick: bool, kernels: Kernels = ALL_KERNELS
) -> Iterator[Scored]:
    """Every option of a unit with weights (rows, cols)."""
    weights = weights.float()
    # The first pair is that of the products, whose kernels round their inputs.
    noise = {
        block: activation_price(weights, variance, curvature.pairs[0][1]) for block, variance in curvature.noise.items()
    }
    for form, approximation, tensors in _made(weights, curvature, forms_for(unit, quick=quick, kernels=kernels)):
        error = approximation - weights
        loss = 0.0 if isinstance(form, FloatForm) else sum(price(error, h, g) for h, g in curvature.pairs)
        if kernels.rounds_inputs and (block := form.activation_block) is not None:
            loss += noise[block]
        size = sum(tensor.nbytes for tensor in tensors.values())
        yield Scored(option=Option(form=form, bytes=size, loss_nats=loss), tensors=tensors)


def _made(weights: Tensor, curvature: Curvature, forms: Sequence[Form]) -> Iterator[tuple[Form, Tensor, Arrays]]:
    """(form, values, tensors) of `weights` in each of `forms`; those in codes are made side by side."""
    error_feedback = feedback(curvature.rounding)
    spectrum: Spectrum | None = None
    rounded = round_to(weights, [form for form in forms if isinstance(form, CodesForm)], error_feedback)
    for form in forms:
        match form:
            case FloatForm():
                yield form, *stored(weights, form, error_feedback)
            case CodesForm():
                codes = next(rounded)
                yield form, values(codes, form), packed(codes, form)
            case LowRankForm():
                spectrum = spectrum or decompose(weights, *curvature.pairs[0])
                yield form, *low_rank(weights, spectrum, form, error_feedback)
            case PivotForm():
                spectrum = spectrum or decompose(weights, *curvature.pairs[0])
                yield form, *pivoted(weights, spectrum, form, error_feedback)
            case _:
                assert_never(form)
