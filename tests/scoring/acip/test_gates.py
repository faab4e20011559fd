"""ACIP's gates and the order of everything, against what the paper says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packager.scoring.acip.gates import (
    OPEN,
    SCALE,
    Fate,
    Order,
    Schedule,
    gate,
    kept_share,
    penalty,
    shares_along,
    stored_elements,
    total_order,
)

PUBLISHED = Schedule(first=1e-3, growth=1.01, every=4, speed=1.0)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def fates_of(sizes: list[tuple[int, int]], seed: int, steps: int = 5) -> dict[str, Fate]:
    """Random ends of training: some directions pruned, some at the same step and height, some open."""
    generator = np.random.default_rng(seed)
    made = {}
    for number, shape in enumerate(sizes):
        count = min(shape)
        alive = generator.random(count) < 0.4
        heights = generator.choice([0.001, 0.002, 0.01], count).astype(np.float32)
        pruned = np.where(alive, OPEN, generator.integers(0, steps, count)).astype(np.int32)
        made[f"unit.{number}"] = Fate(
            shape=shape, mask=np.where(alive, heights, -heights), pruned=pruned, fell_to=np.where(alive, 0, -heights)
        )
    return made


def test_an_open_gate_lets_its_scale_through_and_a_shut_one_nothing() -> None:
    mask = torch.tensor([0.5, SCALE, 1e-30, 0.0, -1e-30, -3.0], requires_grad=True)
    opened = gate(mask)
    assert opened.tolist() == [pytest.approx(SCALE)] * 3 + [0.0] * 3
    (opened * torch.arange(1.0, 7.0)).sum().backward()
    assert mask.grad is not None
    assert mask.grad.tolist() == [1, 2, 3, 0, 0, 0]  # relu's gradient: the value does not depend on the mask


def test_the_penalty_is_one_sided() -> None:
    masks = [
        torch.tensor([0.5, -2.0], requires_grad=True),
        torch.tensor([0.25, 0.0], dtype=torch.float16, requires_grad=True),
    ]
    total = penalty(masks)
    assert (float(total.detach()), total.dtype) == (0.75, torch.float32)
    total.backward()
    assert [mask.grad.tolist() for mask in masks if mask.grad is not None] == [[1, 0], [1, 0]]


def test_the_penalty_grows_by_a_hundredth_every_four_steps() -> None:
    assert [PUBLISHED.at(step) for step in (0, 3, 4, 7, 8)] == pytest.approx([1e-3, 1e-3, 1.01e-3, 1.01e-3, 1.0201e-3])
    fast = Schedule(first=1e-3, growth=1.01, every=4, speed=25.0)
    assert [fast.at(step) for step in range(0, 40, 4)] == pytest.approx(
        [PUBLISHED.at(25 * step) for step in range(0, 40, 4)]
    )


def published_score(fate: Fate, now: int) -> np.ndarray:  # type: ignore[type-arg]
    """μ where the direction is open; where it is pruned it began at 0 and lost 1 at every step since."""
    return np.where(fate.pruned == OPEN, fate.mask, fate.pruned - now)


@given(st.lists(shapes, min_size=1, max_size=4), st.integers(0, 10_000))
def test_the_order_is_that_of_the_published_score_and_has_no_ties(sizes: list[tuple[int, int]], seed: int) -> None:
    fates = fates_of(sizes, seed)
    order = total_order(fates, PUBLISHED, mask_rate=5e-5)
    entries = list(zip(order.units.tolist(), order.directions.tolist(), strict=True))
    assert sorted(entries) == [
        (number, index) for number, name in enumerate(order.names) for index in range(min(fates[name].shape))
    ]
    scores = [float(published_score(fates[order.names[unit]], now=5)[index]) for unit, index in entries]
    assert scores == sorted(scores)
    assert bool((np.diff(order.levels) >= 0).all())
    # Ties of the score fall by height, then unit, then from the last index.
    for (unit, index), (unit_after, index_after) in itertools.pairwise(entries):
        before, after = fates[order.names[unit]], fates[order.names[unit_after]]
        if before.pruned[index] == after.pruned[index_after] and before.mask[index] == after.mask[index_after]:
            assert (unit, -index) < (unit_after, -index_after)


@given(st.lists(shapes, min_size=2, max_size=4), st.integers(0, 10_000))
def test_the_order_of_units_changes_nothing(sizes: list[tuple[int, int]], seed: int) -> None:
    fates = fates_of(sizes, seed)
    order = total_order(fates, PUBLISHED, mask_rate=5e-5)
    again = total_order(dict(reversed(fates.items())), PUBLISHED, mask_rate=5e-5)
    for field in ("units", "directions", "levels"):
        assert np.array_equal(getattr(order, field), getattr(again, field))


def test_an_open_direction_is_worth_the_penalty_at_which_it_would_have_gone() -> None:
    fate = Fate(
        shape=(3, 9),
        mask=np.array([0.01, -0.1, 0.002], np.float32),
        pruned=np.array([OPEN, 7, OPEN], np.int32),
        fell_to=np.array([0, -0.001, 0], np.float32),
    )
    order = total_order({"one": fate}, PUBLISHED, mask_rate=0.001)
    assert order.directions.tolist() == [1, 2, 0]
    np.testing.assert_allclose(order.levels, 1e-3 * 1.01 ** (np.array([7, 8 + 2, 8 + 10]) / 4), rtol=1e-6)


@given(st.lists(shapes, min_size=1, max_size=4), st.integers(0, 10_000), st.integers(0, 4))
def test_shares_along_the_order_are_the_shares_of_its_prefixes(
    sizes: list[tuple[int, int]], seed: int, adapter: int
) -> None:
    order: Order = total_order(fates_of(sizes, seed), PUBLISHED, mask_rate=5e-5)
    found = shares_along(order, sizes, adapter)
    ranks = [min(shape) for shape in sizes]
    assert kept_share(sizes, ranks, adapter) == 1.0
    for position, unit in enumerate(order.units):
        ranks[unit] -= 1
        assert found[position] == pytest.approx(kept_share(sizes, ranks, adapter))
    assert ranks == [0] * len(sizes)


def test_a_matrix_is_kept_whole_where_factors_are_no_smaller() -> None:
    assert [stored_elements((4, 12), rank) for rank in (0, 1, 2, 3, 4)] == [0, 16, 32, 48, 48]
