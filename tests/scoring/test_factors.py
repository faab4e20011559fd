"""Two factors as they are stored: pivot rows, and what rounding one factor means for the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import correlated, weights_of
from torch import Tensor

from packager.forms.blocks import BlockForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import form_bytes, parse_form
from packager.scoremap.model import Unit
from packager.scoremap.settings import Kernels
from packager.scoring.curvature.moments import Curvature
from packager.scoring.curvature.options import forms_for, score_unit
from packager.scoring.factors import low_rank, pivoted
from packager.scoring.low_rank import decompose, pivot_rows
from packager.scoring.rounding import Feedback, feedback, gptq, packed, price, round_to, values


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 60),
    st.integers(0, 2**31),
    st.sampled_from(["random", "graded", "deficient", "zero", "repeated"]),
)
def test_pivot_rows_make_the_others_with_small_coefficients(rank: int, more: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rank + more, rank, generator=generator)
    match kind:
        case "graded":
            left = left * torch.logspace(0, -6, rank) @ torch.randn(rank, rank, generator=generator)
        case "deficient":
            left = left[:, : rank // 2 + 1] @ torch.randn(rank // 2 + 1, rank, generator=generator)
        case "zero":
            left = torch.zeros_like(left)
        case "repeated":
            left = left[torch.randint(0, rank + more, (rank + more,), generator=generator)]
    rows, coefficients = pivot_rows(left)
    assert sorted(rows.tolist()) == list(range(rank + more))
    assert coefficients.shape == (more, rank)
    if more:
        assert float(coefficients.abs().max()) <= 2.0 + 1e-6
    torch.testing.assert_close(
        coefficients @ left[rows[:rank]], left[rows[rank:]], atol=1e-4 * float(left.abs().max()), rtol=0
    )


def test_rows_are_exchanged_until_no_coefficient_is_large() -> None:
    # Elimination alone takes the rows as they stand (Wilkinson's example) and leaves coefficients up to 2^7.
    square = torch.eye(8) - torch.tril(torch.ones(8, 8), -1)
    left = torch.cat([square, torch.ones(1, 8)])
    plain = left[8:] @ torch.linalg.inv(square)
    assert float(plain.abs().max()) == 128
    rows, coefficients = pivot_rows(left)
    assert float(coefficients.abs().max()) <= 2
    torch.testing.assert_close(coefficients @ left[rows[:8]], left[rows[8:]])


@pytest.mark.parametrize("shape", [(96, 72), (72, 96), (64, 64)])
@pytest.mark.parametrize(
    "label", ["p8.f32", "p63.f32", "p32.f16", "p32.q8g32", "p32.q4g32z", "r32.f32", "r8.f16", "r32.q4g32z"]
)
def test_what_is_made_is_what_is_stored(label: str, shape: tuple[int, int]) -> None:
    form, weights = parse_form(label), weights_of(*shape)
    assert isinstance(form, LowRankForm | PivotForm)
    hessian, gradient = correlated(shape[1], 1), correlated(shape[0], 2)
    make: Any = pivoted if isinstance(form, PivotForm) else low_rank
    approximation, tensors = make(weights, decompose(weights, hessian, gradient), form, feedback(hessian))
    specs = form.tensors(*shape)
    assert {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    assert sum(tensor.nbytes for tensor in tensors.values()) == form_bytes(form, *shape)
    np.testing.assert_allclose(form.dequantize(tensors, *shape), approximation.numpy(), atol=2e-5, rtol=1e-4)
    assert int(torch.linalg.matrix_rank(approximation.double(), rtol=1e-5)) <= form.rank


@pytest.mark.parametrize("rank", [1, 16, 48])
def test_pairs_and_pivots_in_float_are_the_same_matrix(rank: int) -> None:
    weights, hessian, gradient = weights_of(96, 72), correlated(72, 1), correlated(96, 2)
    spectrum, spread = decompose(weights, hessian, gradient), feedback(hessian)
    whole = FloatForm(label="f32")
    pair, _ = low_rank(weights, spectrum, LowRankForm(rank=rank, factors=whole), spread)
    pivot, _ = pivoted(weights, spectrum, PivotForm(rank=rank, factors=whole), spread)
    torch.testing.assert_close(pair, pivot, atol=1e-5, rtol=1e-4)


def naive_pivot(weights: Tensor, hessian: Tensor, gradient: Tensor, form: PivotForm) -> Tensor:
    """The same rows and coefficients, each rounded for itself: nothing is fitted to what was rounded before."""
    assert isinstance(form.factors, BlockForm)
    spectrum = decompose(weights, hessian, gradient)
    left = spectrum.left[:, : form.rank]
    rows, coefficients = pivot_rows(left)
    base = left[rows[: form.rank]] @ spectrum.right[: form.rank]

    def nearest(matrix: Tensor) -> Tensor:
        assert isinstance(form.factors, BlockForm)
        size = matrix.shape[1]
        plain = Feedback(hessian=torch.eye(size), order=torch.arange(size), upper=torch.eye(size))
        return values(gptq(matrix, plain, [form.factors])[0], form.factors)

    return torch.cat([nearest(base), nearest(coefficients) @ nearest(base)])[torch.argsort(rows)]


@pytest.mark.parametrize("shape", [(96, 72), (64, 128)])
def test_fitting_to_what_was_rounded_pays(shape: tuple[int, int]) -> None:
    form = parse_form("p32.q4g32z")
    assert isinstance(form, PivotForm)
    weights, hessian, gradient = weights_of(*shape), correlated(shape[1], 1), correlated(shape[0], 2)
    found, _ = pivoted(weights, decompose(weights, hessian, gradient), form, feedback(hessian))
    naive = naive_pivot(weights, hessian, gradient, form)
    assert price(found - weights, hessian, gradient) < price(naive - weights, hessian, gradient)


@pytest.mark.parametrize("rank", [0, 1])
def test_pivots_under_a_singular_curvature(rank: int) -> None:
    weights = weights_of(40, 48)
    hessian = correlated(48, 1, rank=1) * rank
    gradient = correlated(40, 2, rank=1) * rank
    for label in ("p16.q4g16z", "p16.f32"):
        form = parse_form(label)
        assert isinstance(form, PivotForm)
        found, _ = pivoted(weights, decompose(weights, hessian, gradient), form, feedback(hessian))
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("floats", ["f32", "f16"])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("shape", [(96, 72), (24, 200), (9, 7)])
def test_without_low_bit_kernels_everything_is_float(floats: str, quick: bool, shape: tuple[int, int]) -> None:
    kernels = Kernels(floats=floats, low_bit=False)
    unit = Unit(name="some", kind="linear", rows=shape[0], cols=shape[1], matrix="some")
    hessian = correlated(shape[1], 1)
    curvature = Curvature(pairs=((hessian, correlated(shape[0], 2)),), rounding=hessian, noise={})
    scored = [item.option for item in score_unit(unit, weights_of(*shape), curvature, quick=quick, kernels=kernels)]
    assert [option.form for option in scored] == forms_for(unit, quick=quick, kernels=kernels)
    assert scored[0].form == FloatForm(label=floats)
    assert len(scored) >= 4
    assert all(
        isinstance(option.form, PivotForm) and option.form.factors == FloatForm(label=floats) for option in scored[1:]
    )
    losses = [option.loss_nats for option in scored[1:]]
    assert losses == sorted(losses, reverse=True)
    vocabulary = Unit(name="table", kind="tied", rows=96, cols=72, matrix="table")
    assert forms_for(vocabulary, quick=quick, kernels=kernels) == [FloatForm(label=floats)]


def test_packed_tensors_are_those_of_the_form() -> None:
    form, weights = parse_form("q4g32z"), weights_of(6, 40)
    assert isinstance(form, BlockForm)
    hessian = correlated(40, 1)
    (rounded,) = round_to(weights, [form], feedback(hessian))
    np.testing.assert_array_equal(form.dequantize(packed(rounded, form), 6, 40), values(rounded, form).numpy())
