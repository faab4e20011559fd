"""Lengths of context: which are tried, which are offered, and what a real map's frontier promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packager.errors import InfeasibleBudgetError
from packager.planning.contexts import longest, steps, undominated
from packager.planning.plan import Request, context_frontier, make_plan, smallest_memory
from packager.planning.target import Target
from packager.profile import AUTO, DeviceProfile, parse_profile
from packager.scoremap.opening import OpenedMap, open_map

TOKENS = st.integers(1, 200_000)


@given(TOKENS, TOKENS)
def test_steps_rise_from_end_to_end_by_at_most_half(one: int, other: int) -> None:
    least, most = sorted((one, other))
    found = steps(least, most)
    assert (found[0], found[-1]) == (least, most)
    assert all(before < after <= max(before * 1.5, before + 1) for before, after in itertools.pairwise(found))


def test_steps_of_an_ordinary_range() -> None:
    assert steps(512, 4096) == [512, 768, 1024, 1536, 2048, 3072, 4096]
    assert steps(500, 1100) == [500, 512, 768, 1024, 1100]
    assert steps(512, 512) == [512]


@given(TOKENS, TOKENS, TOKENS)
def test_longest_is_the_last_that_fits(one: int, other: int, limit: int) -> None:
    least, most = sorted((one, other))
    found = longest(lambda tokens: tokens <= limit, least, most)
    assert found == (min(most, limit) if limit >= least else None)


def test_of_no_range_nothing_is_longest() -> None:
    assert longest(lambda tokens: True, 10, 9) is None


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20).map(float)), max_size=30))
def test_what_is_kept_is_what_nothing_dominates(points: list[tuple[int, float]]) -> None:
    kept = [points[number] for number in undominated(points)]
    assert kept == sorted(
        {
            (tokens, loss)
            for tokens, loss in points
            if not any(other != (tokens, loss) and other[0] >= tokens and other[1] <= loss for other in points)
        }
    )


def device(minimum: int, budget: int = 512 * 2**20) -> DeviceProfile:
    text = (
        f'[device]\nmemory = "1GiB"\nbudget = "{budget}"\n[runtime]\nchunk_tokens = '
        f"32\n[context]\ntokens = 1024\nminimum = {minimum}\n"
    )
    return parse_profile(text, where="box.toml", name="box")


@pytest.fixture(scope="module")
def loaded(maps: Callable[[str], Path]) -> OpenedMap:
    return open_map(maps("llama"))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(minimum=st.integers(33, 1024), spare=st.integers(0, 500_000), reserve=st.integers(-50_000, 50_000))
def test_a_frontier_trades_loss_for_context_within_the_budget(
    loaded: OpenedMap, minimum: int, spare: int, reserve: int
) -> None:
    least = smallest_memory(loaded, device(minimum), minimum).peak_bytes + reserve
    profile = device(minimum, least + spare)
    plans = context_frontier(loaded, profile, reserve_bytes=reserve)
    assert all(plan.peak_bytes + reserve <= profile.budget_bytes for plan in plans)
    assert plans[0].context_tokens >= minimum
    for shorter, longer in itertools.pairwise(plans):
        assert shorter.context_tokens < longer.context_tokens
        assert shorter.loss_nats < longer.loss_nats
    # Nothing that was asked for is better than what is taken, and nothing longer fits than the last.
    assert plans[0].loss_nats <= make_plan(loaded, profile, context_tokens=minimum, reserve_bytes=reserve).loss_nats
    if plans[-1].context_tokens < 1024:
        with pytest.raises(InfeasibleBudgetError):
            make_plan(loaded, profile, context_tokens=plans[-1].context_tokens + 1, reserve_bytes=reserve)
    request = Request(profile=profile, context_tokens=AUTO, cache="float")
    assert request.plan(loaded, reserve) == plans[0]
    # With any cache on offer no context costs more, and each is offered once.
    either = Request(profile=profile, context_tokens=AUTO).frontier(loaded, reserve)
    assert all(
        shorter.context_tokens < longer.context_tokens and shorter.loss_nats < longer.loss_nats
        for shorter, longer in itertools.pairwise(either)
    )
    assert all(
        any(other.context_tokens >= plan.context_tokens and other.loss_nats <= plan.loss_nats for other in either)
        for plan in plans
    )


def test_context_that_costs_nothing_is_taken(loaded: OpenedMap) -> None:
    """With room for the whole model there is nothing to trade."""
    (plan,) = context_frontier(loaded, device(33), target=Target(fill=True))
    assert (plan.context_tokens, plan.prefix) == (1024, 0)


def test_a_minimum_beyond_the_model_is_the_model_s(loaded: OpenedMap) -> None:
    text = '[device]\nmemory = "1GiB"\nbudget = "1GiB"\n[runtime]\n[context]\ntokens = 4096\n'
    (plan,) = context_frontier(loaded, parse_profile(text, where="box.toml", name="box"))
    assert plan.context_tokens == 1024


def test_no_room_for_the_minimum_is_infeasible(loaded: OpenedMap) -> None:
    least = smallest_memory(loaded, device(512), 512).peak_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        context_frontier(loaded, device(512, least - 1))
    assert caught.value.minimum_bytes == least
