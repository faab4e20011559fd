"""Matrices in two factors, made as they are stored: a pair up · down, or some rows and the others made of them.

Maths over tensors; nothing here knows a model. W is (N, K), H = E[x xᵀ] is (K, K). Whatever is rounded first, what
comes after is fitted to it: the second factor is refitted under H to the rounded first, and rounded under the second
moment of what it then reads.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packager.forms.codes import CodesForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.scoring.low_rank import Spectrum, pivot_rows, refit_left
from packager.scoring.rounding import Feedback, feedback, packed, round_to, values

Arrays = dict[str, NDArray[np.generic]]


def stored(matrix: Tensor, form: FloatForm | CodesForm, spread: Feedback) -> tuple[Tensor, Arrays]:
    """A matrix in `form`: its values as float32, and its tensors."""
    match form:
        case FloatForm():
            arrays = form.pack(matrix.cpu().numpy())
            return torch.from_numpy(form.dequantize(arrays, *matrix.shape)).to(matrix.device), arrays
        case CodesForm():
            (rounded,) = round_to(matrix, [form], spread)
            return values(rounded, form), packed(rounded, form)
        case _:
            assert_never(form)


def low_rank(weights: Tensor, spectrum: Spectrum, form: LowRankForm, spread: Feedback) -> tuple[Tensor, Arrays]:
    """`weights` truncated to the form's rank: its values and tensors."""
    down, down_arrays = stored(spectrum.right[: form.rank], form.factors, spread)
    left = (
        spectrum.left[:, : form.rank]
        if isinstance(form.factors, FloatForm)
        else refit_left(weights, down, spread.hessian)
    )
    up, up_arrays = stored(left, form.factors, feedback(down @ spread.hessian @ down.T))
    return up @ down, form.pack(down_arrays, up_arrays)


def pivoted(weights: Tensor, spectrum: Spectrum, form: PivotForm, spread: Feedback) -> tuple[Tensor, Arrays]:
    """The same truncation as rows of itself and what the other rows are of them."""
    left = spectrum.left[:, : form.rank]
    rows, coefficients = pivot_rows(left)
    chosen, others = rows[: form.rank], rows[form.rank :]
    base, base_arrays = stored(left[chosen] @ spectrum.right[: form.rank], form.factors, spread)
    if not isinstance(form.factors, FloatForm):
        coefficients = refit_left(weights[others], base, spread.hessian)
    rest, rest_arrays = stored(coefficients, form.factors, feedback(base @ spread.hessian @ base.T))
    order = torch.argsort(rows)
    approximation = torch.cat([base, rest @ base])[order]
    return approximation, form.pack(base_arrays, rest_arrays, order.cpu().numpy().astype(np.int32))
