"""Targets other than the budget: the knee, a largest rise, a largest file, a largest ratio, and the margin."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packager.bundle.writer import Recipe, write_contents
from packager.errors import ArtifactError, InfeasibleBudgetError, UsageError
from packager.graph.skeleton_bytes import skeleton_bytes
from packager.planning.plan import Plan, Request, make_plan, smallest_memory
from packager.planning.target import KNEE_NATS, Target
from packager.profile import DeviceProfile, load_profile
from packager.scoremap.opening import OpenedMap, open_map

MIB = 1 << 20
CONTEXT = 128


@pytest.fixture(scope="module")
def loaded(maps: Callable[[str], Path]) -> OpenedMap:
    return open_map(maps("taught"))


@pytest.fixture(scope="module")
def laptop() -> DeviceProfile:
    return replace(load_profile("laptop-16gb"), context_tokens=CONTEXT)


def planned(loaded: OpenedMap, profile: DeviceProfile, target: Target, budget: int | None = None) -> Plan:
    return make_plan(loaded, profile, budget_bytes=budget, target=target)


def test_a_large_budget_stops_where_nothing_is_won(loaded: OpenedMap, laptop: DeviceProfile) -> None:
    whole, knee = (planned(loaded, laptop, target) for target in (Target(fill=True), Target()))
    assert (whole.prefix, whole.bound) == (0, "largest")
    assert (knee.bound, knee.allowed_bytes) == ("knee", whole.file_bytes)
    assert knee.file_bytes < whole.file_bytes
    assert knee.loss_nats <= whole.loss_nats + KNEE_NATS
    assert planned(loaded, laptop, Target(max_rise_nats=knee.loss_nats)).choices == knee.choices


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spares=st.lists(st.integers(0, 300_000), min_size=2, max_size=5),
    fill=st.booleans(),
    ratio=st.none() | st.floats(0.5, 2.5),
)
def test_loss_falls_with_the_budget_and_sizes_are_nested(
    loaded: OpenedMap, laptop: DeviceProfile, spares: list[int], fill: bool, ratio: float | None
) -> None:
    least = smallest_memory(loaded, laptop, CONTEXT).peak_bytes
    target = Target(fill=fill, most_ratio=ratio)
    plans = [planned(loaded, laptop, target, least + spare) for spare in sorted(spares)]
    for spare, plan in zip(sorted(spares), plans, strict=True):
        assert plan.peak_bytes <= least + spare
        assert ratio is None or plan.ratio <= ratio
    for small, large in itertools.pairwise(plans):
        assert large.loss_nats <= small.loss_nats
        assert large.prefix <= small.prefix


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rises=st.lists(st.floats(0.0005, 2.0), min_size=2, max_size=5))
def test_a_larger_rise_gives_a_smaller_model(loaded: OpenedMap, laptop: DeviceProfile, rises: list[float]) -> None:
    plans = [planned(loaded, laptop, Target(max_rise_nats=rise)) for rise in sorted(rises)]
    for rise, plan in zip(sorted(rises), plans, strict=True):
        assert plan.loss_nats <= rise
        assert plan.bound == "max-rise"
    for strict, lax in itertools.pairwise(plans):
        assert lax.peak_bytes <= strict.peak_bytes
        assert lax.prefix >= strict.prefix


@pytest.mark.parametrize("name", ["taught", "gemma3", "qwen2"])
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_graph_and_weights_are_never_over_the_file_size(
    name: str, cache: str, maps: Callable[[str], Path], laptop: DeviceProfile, tmp_path: Path
) -> None:
    source = open_map(maps(name))
    largest = Request(profile=laptop, cache=cache, target=Target(fill=True)).plan(source)
    request = Request(profile=laptop, cache=cache, target=Target(most_bytes=1, fill=True))
    with pytest.raises(InfeasibleBudgetError, match="is too little: graph and weights") as caught:
        request.plan(source)
    least = int(str(caught.value).rpartition("(")[2].split()[0].replace(",", ""))
    for number, share in enumerate((0.0, 0.3, 1.0, 3.0)):
        size = int(least + share * largest.file_bytes)
        plan = replace(request, target=Target(most_bytes=size, fill=True)).plan(source)
        assert plan.bound == ("file-size" if plan.prefix else "largest")
        root = tmp_path / f"{number}"
        write_contents(Recipe(source=source.with_cache(cache), plan=plan, profile=laptop), root)
        written = sum(path.stat().st_size for path in (root / "onnx").iterdir())
        assert written <= size
    assert plan.choices == largest.choices


def test_bounds_out_of_reach_say_what_is_possible(loaded: OpenedMap, laptop: DeviceProfile) -> None:
    budget = smallest_memory(loaded, laptop, CONTEXT).peak_bytes
    with pytest.raises(InfeasibleBudgetError, match="out of reach: the best model within") as caught:
        planned(loaded, laptop, Target(max_rise_nats=0.001), budget)
    needed = caught.value.minimum_bytes
    assert budget < needed
    assert planned(loaded, laptop, Target(max_rise_nats=0.001), needed).loss_nats <= 0.001
    with pytest.raises(InfeasibleBudgetError):
        planned(loaded, laptop, Target(max_rise_nats=0.001), needed - 1)
    with pytest.raises(InfeasibleBudgetError, match=r"a ratio of 0\.01 is too little"):
        planned(loaded, laptop, Target(most_ratio=0.01))
    with pytest.raises(UsageError, match="give one of them"):
        Target(fill=True, max_rise_nats=0.1)


def test_all_that_are_given_hold(loaded: OpenedMap, laptop: DeviceProfile) -> None:
    knee = planned(loaded, laptop, Target())
    both = planned(loaded, laptop, Target(most_ratio=0.9 * knee.ratio, max_rise_nats=1.0))
    assert both.ratio <= 0.9 * knee.ratio
    assert both.loss_nats <= 1.0


def test_the_margin_is_kept_free_and_stated(loaded: OpenedMap, laptop: DeviceProfile) -> None:
    request = Request(profile=laptop, cache="float", target=Target(fill=True)).unmeasured()
    margin = laptop.coefficients.margin_bytes
    least = smallest_memory(loaded, laptop, CONTEXT).peak_bytes
    plan = replace(request, budget_bytes=least + margin).plan(loaded)
    assert plan.margin_bytes == margin == 20 * MIB
    assert plan.peak_bytes + margin <= plan.budget_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        replace(request, budget_bytes=least + margin - 1).plan(loaded)
    assert caught.value.minimum_bytes == least + margin
    assert "margin, since nothing is measured" in str(caught.value)
    assert "within the prediction's error (20.0 MiB) of the smallest model's need" in str(caught.value)
    older = {key: value for key, value in plan.to_dict().items() if key not in ("margin_bytes", "bound")}
    assert Plan.from_dict(older, "plan.json").margin_bytes == 0


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(ArtifactError, match="is not a graph"):
        skeleton_bytes(path, 64)
