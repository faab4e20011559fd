"""Hulls, the merged list and its prefixes, against brute force on small instances."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packager.errors import ArtifactError
from packager.forms.low_rank import LowRankForm
from packager.forms.registry import parse_form
from packager.planning.solver import Solution, choice_at, solve, total_bytes, total_loss
from packager.scoremap.model import Option, ScoreMap, Unit, hull, make_map, restricted, reweighed

FORMS = [parse_form(label) for label in ("f32", "f16", "q8g32", "q8g64", "q4g32", "q4g64", "q2g32", "q2g64")]
points = st.lists(
    st.tuples(st.integers(1, 400), st.floats(0, 50, allow_subnormal=False)), min_size=1, max_size=len(FORMS)
)


def options_of(pairs: Sequence[tuple[int, float]]) -> list[Option]:
    return [Option(form=form, bytes=size, loss_nats=loss) for form, (size, loss) in zip(FORMS, pairs, strict=False)]


def map_of(units: Sequence[Sequence[tuple[int, float]]]) -> ScoreMap:
    return make_map(
        [
            Unit(name=f"unit {number}", kind="linear", rows=8, cols=32, matrix=f"unit {number}")
            for number in range(len(units))
        ],
        [options_of(pairs) for pairs in units],
    )


def within(scoremap: ScoreMap, budget: int) -> Solution | None:
    return solve(scoremap, lambda choice: total_bytes(scoremap, choice) <= budget)


def budgets(scoremap: ScoreMap, count: int) -> list[int]:
    least, most = (sum(chain[index].bytes for chain in scoremap.options) for index in (-1, 0))
    return [least + (most - least) * step // (count - 1) for step in range(count)]


maps = st.lists(points, min_size=1, max_size=4).map(map_of)
large_maps = st.lists(points, min_size=1, max_size=30).map(map_of)


@given(points)
def test_a_hull_is_convex_and_below_every_option(pairs: list[tuple[int, float]]) -> None:
    options = options_of(pairs)
    chain = hull(options)
    assert set(chain) <= set(options)
    assert chain[-1].bytes == min(option.bytes for option in options)
    assert chain[0].loss_nats == min(option.loss_nats for option in options)
    slopes = [(low.loss_nats - high.loss_nats) / (high.bytes - low.bytes) for high, low in itertools.pairwise(chain)]
    assert all(slope > 0 for slope in slopes)
    assert all(before < after for before, after in itertools.pairwise(slopes))
    for option in options:
        # No option lies below the line between its neighbours on the hull, nor beats a corner.
        for high, low in itertools.pairwise(chain):
            if low.bytes <= option.bytes <= high.bytes:
                share = (option.bytes - low.bytes) / (high.bytes - low.bytes)
                assert option.loss_nats >= low.loss_nats + share * (high.loss_nats - low.loss_nats) - 1e-9
        assert not any(option.bytes <= corner.bytes and option.loss_nats < corner.loss_nats for corner in chain)


@given(points, st.randoms(use_true_random=False))
def test_a_hull_does_not_depend_on_the_order_of_options(pairs: list[tuple[int, float]], random: object) -> None:
    options = options_of(pairs)
    shuffled = list(options)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert hull(shuffled) == hull(options)


@given(maps)
def test_moves_take_every_unit_down_its_hull_once(scoremap: ScoreMap) -> None:
    taken = [0] * len(scoremap.units)
    for move in scoremap.moves:
        assert move.option == taken[move.unit] + 1
        taken[move.unit] = move.option
    assert taken == [len(chain) - 1 for chain in scoremap.options]


@settings(deadline=None)
@given(maps, st.data())
def test_never_over_budget_and_none_only_where_nothing_fits(scoremap: ScoreMap, data: st.DataObject) -> None:
    least = sum(chain[-1].bytes for chain in scoremap.options)
    most = sum(chain[0].bytes for chain in scoremap.options)
    budget = data.draw(st.integers(0, most + 10))
    solution = within(scoremap, budget)
    assert (solution is None) == (budget < least)
    if solution is not None:
        assert total_bytes(scoremap, solution.choice) <= budget
        if budget >= most:
            assert solution.choice == (0,) * len(scoremap.units)


@settings(deadline=None)
@given(maps)
def test_every_prefix_is_the_best_choice_of_its_bytes(scoremap: ScoreMap) -> None:
    """Brute force over all choices of all hull options."""
    everything = [
        (total_bytes(scoremap, choice), total_loss(scoremap, choice))
        for choice in itertools.product(*(range(len(chain)) for chain in scoremap.options))
    ]
    for count in range(len(scoremap.moves) + 1):
        choice = choice_at(scoremap, count)
        size, loss = total_bytes(scoremap, choice), total_loss(scoremap, choice)
        best = min(other for bytes_, other in everything if bytes_ <= size)
        assert loss <= best + 1e-9
        solution = within(scoremap, size)
        assert solution is not None
        assert total_loss(scoremap, solution.choice) == pytest.approx(loss, abs=1e-9)


@settings(deadline=None)
@given(maps, st.data())
def test_between_prefixes_the_loss_is_at_most_one_step_from_the_best(scoremap: ScoreMap, data: st.DataObject) -> None:
    sizes = [sum(chain[index].bytes for chain in scoremap.options) for index in (-1, 0)]
    budget = data.draw(st.integers(*sizes))
    solution = within(scoremap, budget)
    assert solution is not None
    best = min(
        total_loss(scoremap, choice)
        for choice in itertools.product(*(range(len(chain)) for chain in scoremap.options))
        if total_bytes(scoremap, choice) <= budget
    )
    found = total_loss(scoremap, solution.choice)
    assert best <= found + 1e-9
    if solution.prefix:
        # The prefix one move shorter is over budget and no worse than any choice that fits.
        assert total_loss(scoremap, choice_at(scoremap, solution.prefix - 1)) <= best + 1e-9


@settings(deadline=None, max_examples=30)
@given(large_maps)
def test_over_200_budgets_prefixes_are_nested_and_loss_is_monotone(scoremap: ScoreMap) -> None:
    previous: Solution | None = None
    for budget in budgets(scoremap, 200):
        solution = within(scoremap, budget)
        assert solution is not None
        assert total_bytes(scoremap, solution.choice) <= budget
        if previous is not None:
            assert solution.prefix <= previous.prefix
            smaller, larger = choice_at(scoremap, previous.prefix), choice_at(scoremap, solution.prefix)
            assert all(low >= high for low, high in zip(smaller, larger, strict=True))
            assert total_loss(scoremap, solution.choice) <= total_loss(scoremap, previous.choice) + 1e-9
        previous = solution


@settings(deadline=None, max_examples=60)
@given(st.lists(points, min_size=1, max_size=8), st.data())
def test_the_order_of_units_does_not_change_the_forms(
    units: list[list[tuple[int, float]]], data: st.DataObject
) -> None:
    scoremap = map_of(units)
    order = data.draw(st.permutations(range(len(units))))
    shuffled = make_map([scoremap.units[number] for number in order], [options_of(units[number]) for number in order])
    least, most = (sum(chain[index].bytes for chain in scoremap.options) for index in (-1, 0))
    budget = data.draw(st.integers(least, most))

    def forms(some: ScoreMap) -> dict[str, str]:
        solution = within(some, budget)
        assert solution is not None
        return {
            unit.name: chain[taken].form.label
            for unit, chain, taken in zip(some.units, some.options, solution.choice, strict=True)
        }

    assert forms(shuffled) == forms(scoremap)


def test_ties_between_units_do_not_depend_on_their_order() -> None:
    """Layers of one shape with losses of exactly zero slope apart are common: equal slopes must be ordered by name."""
    units = [Unit(name=name, kind="linear", rows=8, cols=32, matrix=name) for name in ("b", "a", "c")]
    chain = options_of([(100, 0.0), (50, 1.0), (25, 4.0)])
    one, other = make_map(units, [chain] * 3), make_map(units[::-1], [chain] * 3)
    for budget in range(75, 301):
        found = []
        for some in (one, other):
            solution = within(some, budget)
            assert solution is not None
            found.append({unit.name: taken for unit, taken in zip(some.units, solution.choice, strict=True)})
        assert found[0] == found[1], budget


def test_the_undone_step_is_the_best_that_fits() -> None:
    scoremap = map_of([[(100, 0.0), (10, 90.0)], [(50, 0.0), (40, 1.0)], [(60, 0.0), (40, 4.0)]])
    # Slopes: 1.0, 0.1, 0.2. All three moves leave 90; undoing the first needs 180.
    solution = within(scoremap, 130)
    assert solution is not None
    assert solution.prefix == 3
    assert solution.choice == (1, 1, 0)


def test_restricted_maps_keep_only_what_runs() -> None:
    scoremap = map_of([[(100, 0.0), (90, 0.1), (50, 0.5), (49, 0.6), (25, 3.0)]])
    no_q8 = restricted(scoremap, lambda unit, form: form != FORMS[2])
    assert FORMS[2] not in [option.form for option in no_q8.options[0]]
    assert no_q8.options[0][0].form == FORMS[0]
    with pytest.raises(ArtifactError) as caught:
        restricted(scoremap, lambda unit, form: isinstance(form, LowRankForm))
    assert (
        str(caught.value)
        == "unit unit 0: none of its options runs on this device; score again with options it has kernels for"
    )


@given(maps, st.integers(2, 5))
def test_reweighing_by_a_factor_changes_no_choice(scoremap: ScoreMap, factor: int) -> None:
    weights = {
        (unit.name, option.form): option.bytes * factor
        for unit, chain in zip(scoremap.units, scoremap.options, strict=True)
        for option in chain
    }
    scaled = reweighed(scoremap, lambda unit, form: weights[unit.name, form])
    assert scaled.moves == scoremap.moves
    assert [
        [dataclasses.replace(option, bytes=option.bytes // factor) for option in chain] for chain in scaled.options
    ] == [list(chain) for chain in scoremap.options]


def test_leftover_bytes_go_to_the_same_unit_in_any_order() -> None:
    """Two units alike, and bytes for one of them: which one does not hang on the order they are listed in."""
    points = {"a": [(1, 1.0), (4, 0.0)], "b": [(1, 1.0), (4, 0.0)], "c": [(1, 2.0), (5, 0.0)]}
    chosen = []
    for names in (("c", "a", "b"), ("c", "b", "a")):
        units = [Unit(name=name, kind="linear", rows=8, cols=32, matrix=name) for name in names]
        scoremap = make_map(units, [options_of(points[name]) for name in names])
        solution = within(scoremap, 6)
        assert solution is not None
        assert sum(solution.choice) == len(scoremap.moves) - 1  # one step was taken back
        chosen.append(dict(zip(names, solution.choice, strict=True)))
    assert chosen[0] == chosen[1]
