"""The maths of scoring: rounding, pricing, low rank, and curvature against a naive computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PICO, Pico, random_model
from made_up import correlated, matrices_of, weights_of
from torch import Tensor

from packager.forms.blocks import BITS, BlockForm
from packager.forms.codes import BLOCKS
from packager.forms.floats import FloatForm
from packager.forms.kinds import KINDS
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import form_bytes, has_kernels, parse_form
from packager.forms.split import SplitForm
from packager.scoremap.model import Unit
from packager.scoremap.settings import Kernels
from packager.scoring.curvature.moments import Curvature, collect
from packager.scoring.curvature.options import forms_for, score_unit
from packager.scoring.low_rank import decompose, refit_left
from packager.scoring.method import large_unit
from packager.scoring.rounding import (
    Feedback,
    Rounded,
    activation_error,
    activation_price,
    descend,
    feedback,
    gptq,
    inverse_factor,
    packed,
    price,
    refit_scales,
    round_to,
    values,
)
from packager.source.unit_weights import Source, find_sources

BLOCK_LABELS = ["q8g32", "q8g32z", "q4g32", "q4g32z", "q4g64z", "q2g16", "q2g32z", "q2g64"]
SHAPES = [(24, 64), (7, 40), (33, 104)]


def block_form(label: str) -> BlockForm:
    form = parse_form(label)
    assert isinstance(form, BlockForm)
    return form


def nearest(weights: Tensor, hessian: Tensor, form: BlockForm) -> Rounded:
    """Round to nearest on the very same grid search: gptq with nothing to spread."""
    cols = weights.shape[1]
    return gptq(weights, Feedback(hessian=hessian, order=torch.arange(cols), upper=torch.eye(cols)), [form])[0]


def h_error(weights: Tensor, rounded: Rounded, hessian: Tensor, form: BlockForm) -> float:
    error = (values(rounded, form) - weights).double()
    return float(torch.trace(error @ hessian.double() @ error.T))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label", BLOCK_LABELS)
def test_gptq_beats_rounding_to_nearest(label: str, shape: tuple[int, int]) -> None:
    form, weights, hessian = block_form(label), weights_of(*shape), correlated(shape[1], 1)
    (spread,) = gptq(weights, feedback(hessian), [form])
    assert h_error(weights, spread, hessian, form) < h_error(weights, nearest(weights, hessian, form), hessian, form)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label", BLOCK_LABELS)
def test_refitted_scales_never_increase_the_error(label: str, shape: tuple[int, int], rank: int | None) -> None:
    form, weights, hessian = block_form(label), weights_of(*shape), correlated(shape[1], 2, rank)
    (rounded,) = gptq(weights, feedback(hessian), [form])
    refitted = refit_scales(rounded, weights @ hessian, hessian, form)
    before, after = h_error(weights, rounded, hessian, form), h_error(weights, refitted, hessian, form)
    assert after <= before * (1 + 1e-5) + 1e-12
    assert torch.equal(refitted.codes, rounded.codes)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("label", BLOCK_LABELS)
def test_a_second_look_at_the_codes_never_increases_the_error(
    label: str, shape: tuple[int, int], rank: int | None
) -> None:
    form, weights, hessian = block_form(label), weights_of(*shape), correlated(shape[1], 4, rank)
    spread, damped = feedback(hessian), hessian + 0.01 * float(hessian.diagonal().mean()) * torch.eye(shape[1])
    (before,) = gptq(weights, spread, [form])
    (after,) = descend(weights, [before], spread, [form])
    assert torch.equal(after.scales, before.scales)
    assert h_error(weights, after, damped, form) <= h_error(weights, before, damped, form) * (1 + 1e-5) + 1e-12


def test_a_second_look_pays_where_columns_are_correlated_and_survives_dead_inputs() -> None:
    form, weights, hessian = block_form("q2g16"), weights_of(24, 96), correlated(96, 5)
    once = refit_scales(gptq(weights, feedback(hessian), [form])[0], weights @ hessian, hessian, form)
    (twice,) = round_to(weights, [form], feedback(hessian))
    assert h_error(weights, twice, hessian, form) < 0.97 * h_error(weights, once, hessian, form)
    (nothing,) = round_to(weights, [form], feedback(torch.zeros(96, 96)))
    assert torch.isfinite(values(nothing, form)).all()


def test_refitted_scales_are_the_least_squares_ones() -> None:
    form, weights, hessian = block_form("q2g16"), weights_of(3, 48), correlated(48, 3)
    (rounded,) = gptq(weights, feedback(hessian), [form])
    refitted = refit_scales(rounded, weights @ hessian, hessian, form)
    best = h_error(weights, refitted, hessian, form)
    for block in range(3):
        for factor in (0.98, 1.02):
            scales = refitted.scales.clone()
            scales[:, block] *= factor
            assert h_error(weights, Rounded(codes=refitted.codes, scales=scales, zeros=None), hessian, form) > best


@pytest.mark.parametrize("label", BLOCK_LABELS)
@pytest.mark.parametrize("damage", ["dead inputs", "all dead", "rank one", "huge", "tiny", "zero weights"])
def test_degenerate_inputs_do_not_fail(label: str, damage: str) -> None:
    form, weights, hessian = block_form(label), weights_of(8, 72), correlated(72, 4)
    match damage:
        case "dead inputs":
            hessian[::3] = 0
            hessian[:, ::3] = 0
        case "all dead":
            hessian = torch.zeros(72, 72)
        case "rank one":
            hessian = correlated(72, 4, rank=1)
        case "huge":
            hessian = hessian * 1e12
        case "tiny":
            hessian = hessian * 1e-20
        case "zero weights":
            weights[:4] = 0
    assert bool(torch.isfinite(feedback(hessian).upper).all())
    (rounded,) = round_to(weights, [form], feedback(hessian))
    found = values(rounded, form)
    assert bool(torch.isfinite(found).all())
    # No weight is moved further than its matrix is wide: codes of dead inputs round to nearest.
    assert float((found - weights).abs().max()) < 2 * float(weights.abs().max()) * (2 if form.bits == 2 else 1)
    assert bool(torch.isfinite(torch.tensor(price(found - weights, hessian, torch.eye(8)))))
    if damage == "zero weights":
        assert not found[:4].any()


def test_the_inverse_factor_is_one() -> None:
    hessian = correlated(40, 5).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    factor = inverse_factor(hessian.float()).double()
    assert not torch.tril(factor, -1).any()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("label", BLOCK_LABELS)
def test_what_is_priced_is_what_is_packed(label: str) -> None:
    form, weights, hessian = block_form(label), weights_of(9, 72), correlated(72, 6)
    (rounded,) = round_to(weights, [form], feedback(hessian))
    zeros = rounded.zeros.numpy() if rounded.zeros is not None else None
    packed = form.pack(rounded.codes.numpy(), rounded.scales.numpy(), zeros)
    np.testing.assert_array_equal(form.dequantize(packed, 9, 72), values(rounded, form).numpy())


@pytest.mark.parametrize("elements", [1, 3 * 24 * 80, 1 << 23])
def test_forms_made_side_by_side_are_those_made_alone(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a loop over columns and nothing else; a large matrix is worked on in one form after another."""
    forms = [parse_form(label) for label in (*BLOCK_LABELS, "q6g32")]
    weights, hessian = weights_of(24, 80), correlated(80, 7)
    spread = feedback(hessian)
    alone = [next(round_to(weights, [form], spread)) for form in forms]
    monkeypatch.setattr("packager.scoring.rounding._WORK_ELEMENTS", elements)
    for form, one, many in zip(forms, alone, round_to(weights, forms, spread), strict=True):
        assert float((one.codes != many.codes).double().mean()) < 0.005, (
            form.label
        )  # sums in another order round a tie to the other side
        assert h_error(weights, many, hessian, form) == pytest.approx(h_error(weights, one, hessian, form), rel=0.01)
        assert (many.zeros is None) == (one.zeros is None)


@pytest.mark.parametrize("label", ["q6g64", "q6g32"])
def test_split_codes_are_one_grid_cut_in_two(label: str) -> None:
    form, weights, hessian = parse_form(label), weights_of(9, 72), correlated(72, 6)
    assert isinstance(form, SplitForm)
    (rounded,) = round_to(weights, [form], feedback(hessian))
    assert int(rounded.codes.max()) > 15
    np.testing.assert_allclose(form.dequantize(packed(rounded, form), 9, 72), values(rounded, form).numpy(), atol=1e-6)


@pytest.mark.parametrize("block", [16, 64, 256])
def test_rounded_inputs_are_off_by_half_a_step_at_most(block: int) -> None:
    inputs = torch.randn(20, 72, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 72)
    error = activation_error(inputs, block)
    for start in range(0, 72, block):
        part = slice(start, start + block)
        step = inputs[:, part].abs().amax(1, keepdim=True) / 127
        assert bool((error[:, part].abs() <= step * 0.501).all())
        assert bool(error[:, part].any())
    assert not activation_error(torch.zeros(3, 72), block).any()


def test_the_price_of_rounded_inputs_is_the_explicit_formula() -> None:
    weights, gradient, noise = weights_of(5, 7), correlated(5, 3), torch.rand(7)
    expected = 0.5 * float(torch.trace(gradient @ weights @ torch.diag(noise) @ weights.T))
    assert activation_price(weights, noise, gradient) == pytest.approx(expected, rel=1e-5)
    diagonal = gradient.diagonal()
    assert activation_price(weights, noise, diagonal) == pytest.approx(
        activation_price(weights, noise, torch.diag(diagonal)), rel=1e-5
    )


def test_price_is_the_explicit_formula() -> None:
    error, hessian, gradient = weights_of(5, 7, 1), correlated(7, 2), correlated(5, 3)
    expected = 0.5 * sum(
        float(gradient[i, j] * error[j, k] * hessian[k, m] * error[i, m])
        for i in range(5)
        for j in range(5)
        for k in range(7)
        for m in range(7)
    )
    assert price(error, hessian, gradient) == pytest.approx(expected, rel=1e-5)
    diagonal = gradient.diagonal()
    assert price(error, hessian, diagonal) == pytest.approx(price(error, hessian, torch.diag(diagonal)), rel=1e-5)
    assert price(torch.zeros(5, 7), hessian, gradient) == 0.0
    assert price(2 * error, hessian, gradient) == pytest.approx(4 * expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_full_rank_reproduces_the_weights(shape: tuple[int, int]) -> None:
    weights = weights_of(*shape)
    spectrum = decompose(weights, correlated(shape[1], 1), correlated(shape[0], 2))
    torch.testing.assert_close(spectrum.left @ spectrum.right, weights, atol=1e-4, rtol=1e-4)
    assert bool((spectrum.costs[:-1] >= spectrum.costs[1:]).all())


def test_costs_are_the_prices_of_dropping() -> None:
    weights, hessian, gradient = weights_of(12, 20), correlated(20, 1), correlated(12, 2)
    spectrum = decompose(weights, hessian, gradient)
    # The costs are those of the damped moments.
    damped_h, damped_g = (
        moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment)) for moment in (hessian, gradient)
    )
    for rank in (0, 1, 4, 11):
        error = spectrum.left[:, :rank] @ spectrum.right[:rank] - weights
        assert price(error, damped_h, damped_g) == pytest.approx(float(spectrum.costs[rank:].sum()), rel=2e-3)


def test_no_other_factors_of_that_rank_are_cheaper() -> None:
    weights, hessian, gradient = weights_of(12, 20), correlated(20, 1), correlated(12, 2)
    spectrum = decompose(weights, hessian, gradient)
    best = price(spectrum.left[:, :4] @ spectrum.right[:4] - weights, hessian, gradient)
    u, s, v = torch.linalg.svd(weights)
    assert best < price((u[:, :4] * s[:4]) @ v[:4] - weights, hessian, gradient)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        left = spectrum.left[:, :4] + 0.03 * torch.randn(12, 4, generator=generator)
        right = spectrum.right[:4] + 0.03 * torch.randn(4, 20, generator=generator)
        assert price(left @ right - weights, hessian, gradient) > best


def test_low_rank_of_singular_moments() -> None:
    weights = weights_of(12, 20)
    for hessian, gradient in (
        (torch.zeros(20, 20), torch.zeros(12, 12)),
        (correlated(20, 1, rank=2), correlated(12, 1, rank=1)),
    ):
        spectrum = decompose(weights, hessian, gradient)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in (spectrum.left, spectrum.right, spectrum.costs))


def test_a_refitted_left_factor_is_the_best() -> None:
    weights, hessian = weights_of(12, 20), correlated(20, 1)
    right = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    left = refit_left(weights, right, hessian)
    best = price(left @ right - weights, hessian, torch.eye(12))
    for row, column in ((0, 0), (5, 3), (11, 2)):
        for step in (-0.01, 0.01):
            other = left.clone()
            other[row, column] += step
            assert price(other @ right - weights, hessian, torch.eye(12)) > best


@pytest.mark.parametrize("kind", ["linear", "head", "embedding", "tied"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_option_of_a_unit_has_its_bytes_and_its_price(kind: str, quick: bool) -> None:
    unit = Unit(name="some", kind=kind, rows=96, cols=72, matrix="some")
    weights, hessian = weights_of(96, 72), correlated(72, 1)
    gradient = correlated(96, 2)
    diagonal = gradient.diagonal()
    pairs = {"linear": ((hessian, gradient),), "tied": ((hessian, diagonal), (correlated(72, 3), diagonal))}.get(
        kind, ((hessian, diagonal),)
    )
    generator = torch.Generator().manual_seed(5)
    noise = {block: torch.rand(72, generator=generator) / 100 for block in BLOCKS}
    curvature = Curvature(pairs=pairs, rounding=hessian, noise=noise)
    scored = list(score_unit(unit, weights, curvature, quick=quick))
    assert [item.option.form for item in scored] == forms_for(unit, quick=quick)
    assert len({item.option.form.label for item in scored}) == len(scored)
    for item in scored:
        form = item.option.form
        assert item.option.bytes == form_bytes(form, 96, 72) == sum(tensor.nbytes for tensor in item.tensors.values())
        error = torch.from_numpy(form.dequantize(item.tensors, 96, 72)) - weights
        inputs = (
            0.0
            if isinstance(form, FloatForm)
            else activation_price(weights, noise[form.activation_block or 0], pairs[0][1])
        )
        assert item.option.loss_nats == pytest.approx(
            sum(price(error, h, g) for h, g in pairs) + inputs, rel=1e-4, abs=1e-12
        )
        if kind != "linear":
            assert not isinstance(form, LowRankForm)
            assert isinstance(form, FloatForm | SplitForm) or form.bits > 2
    exact = score_unit(unit, weights, curvature, quick=quick, kernels=Kernels(rounds_inputs=False))
    losses = {item.option.form.label: item.option.loss_nats for item in exact}
    assert losses["f32"] == 0.0
    assert losses["q8g64"] < losses["q4g64z"]
    if kind == "linear":
        assert losses["q8g64"] < losses["q6g64"] < losses["q4g64z"] < losses["q2g64"]
    if kind == "linear" and not quick:
        assert any(isinstance(item.option.form, PivotForm) for item in scored)


def naive(model: Any, sources: Sequence[Source], windows: Tensor) -> dict[str, list[Tensor]]:
    """H and G by autograd on retained inputs and outputs of every module, one window at a time."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in {source.module for source in sources} | {"lm_head"}:

        def keep(module: Any, arguments: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            kept[name] = (arguments[0], output)

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    sums: dict[str, list[Tensor]] = {}
    tokens = windows.numel()
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    for window in windows:
        model.zero_grad()
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        chances = torch.softmax(logits.detach(), -1)
        variance = (chances - chances.square()).sum(0) / tokens
        frequency = 0.5 * (torch.bincount(window, minlength=chances.shape[1]) + chances.sum(0)) / tokens
        for source in sources:
            x, y = (tensor.detach() if index == 0 else tensor for index, tensor in enumerate(kept[source.module]))
            assert y.grad is not None
            g = y.grad[0]
            head = kept["lm_head"][0].detach()[0]
            scale = float(getattr(model.get_submodule(embedding), "embed_scale", 1.0))
            lookup_grad = kept[embedding][1].grad if embedding in kept else None
            match source.unit.kind:
                case "linear":
                    part = g[:, source.start : source.stop]
                    weight = part.square().sum(1)
                    errors = torch.stack([activation_error(x[0], block).square().T @ weight for block in BLOCKS])
                    new = [
                        x[0].T @ (weight[:, None] * x[0]),
                        part.T @ part / tokens,
                        weight.sum(),
                        x[0].T @ x[0] / tokens,
                        errors,
                    ]
                case "head":
                    new = [head.T @ head / tokens, variance]
                case _:
                    assert lookup_grad is not None
                    table = lookup_grad[0] * scale
                    lookup = [table.T @ table / tokens, frequency]
                    new = lookup if source.unit.kind == "embedding" else [head.T @ head / tokens, variance, *lookup]
            old = sums.get(source.unit.name)
            sums[source.unit.name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
    for handle in handles:
        handle.remove()
    for source in sources:
        if source.unit.kind == "linear":
            weighted, gradients, weight, plain, errors = sums[source.unit.name]
            weighted = weighted / weight
            rounding = 0.5 * weighted / weighted.diagonal().mean() + 0.5 * plain / plain.diagonal().mean()
            sums[source.unit.name] = [weighted, gradients, rounding, errors / weight]
    return sums


@pytest.mark.parametrize(
    ("name", "batch", "exact"),
    [("llama", 1, True), ("llama", 2, True), ("llama", 1, False), ("qwen2", 1, True), ("gemma3", 1, True)],
)
def test_curvature_is_what_autograd_gives(name: str, batch: int, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if exact:
        # Without this, processors that can multiply in bfloat16: good to a few hundredths of the largest entry.
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    tolerance = 1e-4 if exact else 0.04
    model = random_model(name)
    sources = find_sources(matrices_of(model), model)
    windows = torch.randint(2, 384, (3, 48), generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    found = collect(model, sources, windows, blocks=BLOCKS, batch=batch, progress=done.append)
    assert done[-1] == 3
    expected = naive(model, sources, windows)
    assert set(found) == set(expected)
    for unit, tensors in expected.items():
        flat = [tensor for pair in found[unit].pairs for tensor in pair]
        if len(tensors) == 4 and len(flat) == 2:  # a linear layer, whose other moments are of the tokens' weights too
            flat += [found[unit].rounding, torch.stack([found[unit].noise[block] for block in BLOCKS])]
        assert len(flat) == len(tensors)
        if not exact:  # an input on the edge of two codes rounds either way
            flat, tensors = flat[:3], tensors[:3]
        for ours, theirs in zip(flat, tensors, strict=True):
            torch.testing.assert_close(
                ours,
                theirs,
                atol=tolerance * float(theirs.abs().max()),
                rtol=0,
                msg=lambda text, unit=unit: f"{unit}: {text}",
            )


def test_collecting_leaves_the_model_as_it_was() -> None:
    model = random_model("llama")
    sources = find_sources(matrices_of(model), model)
    frozen = dict(model.named_parameters())["model.norm.weight"]
    frozen.requires_grad_(False)
    windows = torch.randint(2, 384, (1, 32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    precision = torch.get_float32_matmul_precision()
    collect(model, sources, windows, blocks=(64,), batch=1, progress=lambda count: None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.norm.weight"
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.get_float32_matmul_precision() == precision


def test_a_stop_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = random_model("llama")
    sources = find_sources(matrices_of(model), model)

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, sources, torch.randint(2, 384, (2, 32)), blocks=(64,), batch=1, progress=interrupt)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_noise_of_one_block_does_not_depend_on_the_others() -> None:
    model = random_model("llama")
    sources = find_sources(matrices_of(model), model)
    windows = torch.randint(2, 384, (2, 64), generator=torch.Generator().manual_seed(0))

    def noise(*blocks: int) -> dict[str, dict[int, Tensor]]:
        found = collect(model, sources, windows, blocks=blocks, batch=1, progress=lambda count: None)
        return {name: item.noise for name, item in found.items()}

    some, every = noise(64), noise(*BLOCKS)
    assert all(set(item) == {64} for item in some.values())
    for name, item in every.items():
        torch.testing.assert_close(some[name][64], item[64])
    assert all(not item for item in noise().values())


@pytest.mark.parametrize(
    "name", sorted(set(PICO) - {"phi3"})
)  # whose packed layers the exporter takes apart; test_graph covers them
def test_every_linear_layer_is_claimed_once(name: str, picos: Callable[[str], Pico]) -> None:
    model = picos(name).model
    sources = find_sources(matrices_of(model), model)
    claimed = sum(source.unit.elements for source in sources)
    assert claimed == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_tried_has_a_kernel(kind: str, quick: bool) -> None:
    assert all(has_kernels(form, BITS) for form in forms_for(large_unit(kind), quick=quick))
