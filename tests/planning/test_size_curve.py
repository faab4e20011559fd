"""Sweeps over sizes: where the sizes lie, and what is made of measured losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import InfeasibleBudgetError, UsageError
from packager.forms.registry import has_kernels, parse_form
from packager.planning.plan import Request
from packager.planning.size_curve import BY_PEAK, Curve, SizePoint, evenly, measured_curve, predict, standard_error
from packager.planning.target import Target
from packager.profile import load_profile
from packager.scoremap.opening import OpenedMap, open_map

LAPTOP = load_profile("laptop-16gb")


@pytest.fixture(scope="module")
def loaded(maps: Callable[[str], Path]) -> OpenedMap:
    return open_map(maps("llama"))


def test_file_sizes_go_from_the_smallest_to_the_largest_by_equal_ratios(loaded: OpenedMap) -> None:
    curve, plans = predict(loaded, Request(profile=LAPTOP), 5, by_peak=False)
    ends = [sum(chain[index].bytes for chain in loaded.scoremap.options) for index in (-1, 0)]
    assert [curve.points[index].file_bytes for index in (0, -1)] == ends
    assert len(curve.points) == len(plans) == 5
    assert all(point.file_bytes <= point.limit_bytes for point in curve.points)
    ratios = [larger.limit_bytes / smaller.limit_bytes for smaller, larger in itertools.pairwise(curve.points)]
    assert max(ratios) - min(ratios) < 1e-3
    losses = [point.predicted_nats for point in curve.points]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
    elements = sum(unit.elements for unit in loaded.scoremap.units)
    for point, plan in zip(curve.points, plans, strict=True):
        assert (point.file_bytes, point.peak_bytes, point.predicted_nats) == (
            plan.file_bytes,
            plan.peak_bytes,
            plan.loss_nats,
        )
        assert point.bits_per_weight == 8 * point.file_bytes / elements
    assert curve.points[-1].bits_per_weight == 32.0


def test_file_sizes_take_only_forms_that_the_device_has_kernels_for(loaded: OpenedMap) -> None:
    profile = replace(LAPTOP, bits=(8,))
    curve, plans = predict(loaded, Request(profile=profile), 5, by_peak=False)
    assert len(curve.points) == 5
    assert {form for plan in plans for form in plan.choices.values()} > {"f32"}
    assert all(has_kernels(parse_form(form), (8,)) for plan in plans for form in plan.choices.values())


def test_peak_sizes_go_from_the_least_budget_to_what_the_map_can_use(loaded: OpenedMap) -> None:
    request = Request(profile=load_profile("edge-box-256mb"))
    curve, plans = predict(loaded, request, 9, by_peak=True)
    assert curve.bounded == BY_PEAK
    assert all(point.peak_bytes <= point.limit_bytes <= request.profile.memory_bytes for point in curve.points)
    whole = replace(request, budget_bytes=request.profile.memory_bytes, target=Target(fill=True))
    assert plans[-1].choices == whole.plan(loaded).choices
    assert curve.points[0].peak_bytes == curve.points[0].limit_bytes
    with pytest.raises(InfeasibleBudgetError):
        replace(request, budget_bytes=curve.points[0].limit_bytes - 1).plan(loaded)
    losses = [point.predicted_nats for point in curve.points]
    assert losses == sorted(losses, reverse=True)


def test_a_map_has_no_more_sizes_than_it_has(loaded: OpenedMap) -> None:
    curve, plans = predict(loaded, Request(profile=LAPTOP), 2000, by_peak=False)
    assert len(curve.points) < 2000
    assert all(first.choices != second.choices for first, second in itertools.pairwise(plans))


@pytest.mark.parametrize("count", [1, 0, -3])
def test_one_size_is_no_curve(loaded: OpenedMap, count: int) -> None:
    for by_peak in (True, False):
        with pytest.raises(UsageError, match=f"^{count} sizes make no curve: expected at least 2$"):
            predict(loaded, Request(profile=LAPTOP), count, by_peak=by_peak)
    with pytest.raises(UsageError):
        evenly(count, 30)


@given(st.integers(2, 60), st.integers(2, 60))
def test_even_positions_hold_both_ends(count: int, total: int) -> None:
    found = evenly(count, total)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, total - 1)
    assert len(found) == min(count, total)
    gaps = np.diff(found)
    assert gaps.max() - gaps.min() <= 1


def test_the_standard_error_is_the_textbooks() -> None:
    samples = np.random.default_rng(0).normal(3.0, 2.0, 10_000)
    assert standard_error(samples) == pytest.approx(2.0 / 100, rel=0.03)
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert math.isnan(standard_error(np.array([1.0])))


def flat_curve(count: int) -> Curve:
    point = SizePoint(limit_bytes=1, file_bytes=1, bits_per_weight=1.0, peak_bytes=1, predicted_nats=0.0, measured=None)
    return Curve(
        map_sha256="", model="", bounded="", profile="", context_tokens=512, points=(point,) * count, measurement=None
    )


def test_measured_points_are_paired_with_the_next_larger_one() -> None:
    generator = np.random.default_rng(1)
    source = generator.exponential(3.0, (8, 511))
    small, large = source + generator.normal(0.5, 0.3, source.shape), source + generator.normal(0.1, 0.3, source.shape)
    curve = measured_curve(flat_curve(5), "some.txt", source, {0: small, 3: large})
    assert [point.measured is None for point in curve.points] == [False, True, True, False, True]
    least, most = curve.points[0].measured, curve.points[3].measured
    assert least is not None
    assert most is not None
    assert least.rise_nats == pytest.approx((small - source).mean())
    assert least.step_nats == pytest.approx((small - large).mean())
    assert (most.step_nats, most.step_noise_nats) == (None, None)
    # The tokens' own losses, far wider, have no part in the errors of differences of independent noise.
    assert least.noise_nats == pytest.approx(0.3 / math.sqrt(source.size), rel=0.3)
    assert least.step_noise_nats == pytest.approx(0.3 * math.sqrt(2 / source.size), rel=0.3)
    assert curve.measurement is not None
    assert (curve.measurement.windows, curve.measurement.tokens, curve.measurement.monotone) == (8, 8 * 511, True)
    assert curve.measurement.source_nats == pytest.approx(source.mean())


@pytest.mark.parametrize(("worse", "monotone"), [(0.0, True), (0.01, True), (0.05, False)])
def test_a_larger_size_may_measure_worse_within_the_noise_only(worse: float, monotone: bool) -> None:
    generator = np.random.default_rng(2)
    source = generator.exponential(3.0, (8, 511))
    losses = {position: source + generator.normal(0.0, 0.3, source.shape) for position in range(2)}
    losses[1] += worse
    measurement = measured_curve(flat_curve(2), "some.txt", source, losses).measurement
    assert measurement is not None
    assert measurement.monotone is monotone


def test_losses_that_go_together_make_larger_errors() -> None:
    """A text where whole passages differ: as many tokens say less."""
    generator = np.random.default_rng(3)
    source = np.zeros((8, 512))
    passages = np.repeat(generator.normal(0.0, 0.3, 8 * 8), 64).reshape(8, 512)
    together = measured_curve(flat_curve(1), "", source, {0: passages}).points[0].measured
    apart = (
        measured_curve(flat_curve(1), "", source, {0: generator.permuted(passages.reshape(-1)).reshape(8, 512)})
        .points[0]
        .measured
    )
    assert together is not None
    assert apart is not None
    assert together.noise_nats > 4 * apart.noise_nats


def test_few_tokens_still_have_an_error() -> None:
    measured = measured_curve(flat_curve(1), "", np.zeros((1, 9)), {0: np.arange(9.0)[None]}).points[0].measured
    assert measured is not None
    assert measured.noise_nats > 0
