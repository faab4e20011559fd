"""When a build is measured again: too near to its budget, over it, or far below a budget that binds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import InfeasibleBudgetError
from packager.pipeline import _next_reserve, _planned_again, _Round
from packager.plan import Plan

MIB = 1 << 20


def round_of(*, budget: int, predicted: int, peak: int, prefix: int = 5) -> _Round:
    plan = Plan(
        schema=1,
        map_sha256="",
        profile="box",
        profile_sha256="",
        budget_bytes=budget,
        context_tokens=64,
        prompt_tokens=32,
        choices={},
        prefix=prefix,
        moves=9,
        file_bytes=1,
        ratio=0.5,
        loss_nats=0.1,
        peak_bytes=predicted,
        memory={},
    )
    return _Round(plan=plan, reserve_bytes=0, peak_bytes=peak)


def test_a_peak_a_little_under_its_budget_will_do() -> None:
    assert _next_reserve(round_of(budget=200 * MIB, predicted=199 * MIB, peak=197 * MIB)) is None


def test_a_process_at_its_very_limit_is_built_again_a_little_smaller() -> None:
    last = round_of(budget=200 * MIB, predicted=198 * MIB, peak=199 * MIB)
    assert _next_reserve(last) == MIB + 2 * MIB  # what was measured beside the prediction, and a hundredth of the budget


def test_the_whole_model_needs_no_margin() -> None:
    assert _next_reserve(round_of(budget=200 * MIB, predicted=198 * MIB, peak=199 * MIB, prefix=0)) is None


def test_unused_memory_counts_only_where_something_was_given_up() -> None:
    assert _next_reserve(round_of(budget=200 * MIB, predicted=199 * MIB, peak=180 * MIB)) == -19 * MIB + 2 * MIB
    assert _next_reserve(round_of(budget=200 * MIB, predicted=150 * MIB, peak=150 * MIB, prefix=0)) is None


@given(budget=st.integers(64, 4096), share=st.floats(0.5, 1.5), error=st.floats(-0.1, 0.1))
def test_what_is_kept_free_leads_below_the_budget_and_near_it(budget: int, share: float, error: float) -> None:
    """A plan that uses up what it may, mispredicted by as much as the last, lands between the margin and the share that is too little."""
    size = budget * MIB
    predicted = int(size * share)
    last = round_of(budget=size, predicted=predicted, peak=predicted + int(size * error))
    reserve = _next_reserve(last)
    if reserve is not None:
        landed = size - reserve + int(size * error)
        assert _next_reserve(round_of(budget=size, predicted=size - reserve, peak=landed)) is None


@dataclass
class Smallest:
    """A request whose smallest plan leaves room for `spare` bytes."""

    spare: int

    def plan(self, loaded: Any, reserve_bytes: int) -> int:
        if reserve_bytes > self.spare:
            raise InfeasibleBudgetError("too little", budget_bytes=1, minimum_bytes=2)
        return reserve_bytes


def test_the_margin_is_given_up_before_the_bundle() -> None:
    over = round_of(budget=200 * MIB, predicted=198 * MIB, peak=201 * MIB)
    reserve = _next_reserve(over)
    assert reserve == 3 * MIB + 2 * MIB
    loaded: Any = None
    for spare, got in ((5 * MIB, 5 * MIB), (4 * MIB, 3 * MIB)):
        request: Any = Smallest(spare)
        assert _planned_again(loaded, request, over, reserve) == got  # type: ignore[comparison-overlap]
    none: Any = Smallest(2 * MIB)
    with pytest.raises(InfeasibleBudgetError):
        _planned_again(loaded, none, over, reserve)
    near = round_of(budget=200 * MIB, predicted=198 * MIB, peak=199 * MIB)
    tight: Any = Smallest(0)
    assert _planned_again(loaded, tight, near, 3 * MIB) is None
