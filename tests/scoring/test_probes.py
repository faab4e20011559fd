"""Classes of options and their multipliers: what may change the order of a map's moves, and by how much."""

from __future__ import annotations

import pytest

from packager.forms.registry import parse_form
from packager.scoremap.identity import Probe
from packager.scoremap.model import Option, Unit
from packager.scoring.probes import corrected, kind_of, multipliers, probe_sets

LABELS = ("f32", "q8g64", "q6g64", "q4g64z", "q2g32z", "r32.q4g32", "p32.q4g32")


def unit(number: int, kind: str = "linear") -> Unit:
    return Unit(name=f"unit.{number}", kind=kind, rows=64, cols=64, matrix=f"matrix.{number}")


def chain(scale: float = 1.0) -> list[Option]:
    return [
        Option(form=parse_form(label), bytes=1000 - 100 * at, loss_nats=scale * at / 100)
        for at, label in enumerate(LABELS)
    ]


@pytest.mark.parametrize("position", [0.0, 0.34, 0.5, 0.99])
def test_classes_are_bits_or_low_rank_by_depth_or_vocabulary(position: float) -> None:
    kinds = {label: kind_of(unit(0), option, position, 3) for label, option in zip(LABELS, chain(), strict=True)}
    third = int(position * 3) + 1
    assert kinds["r32.q4g32"] == kinds["p32.q4g32"] == f"low rank, depth {third} of 3"
    assert kinds["q4g64z"] == f"4 bits, depth {third} of 3" != kinds["q2g32z"]
    assert kinds["q6g64"] == f"6 bits, depth {third} of 3"
    assert kind_of(unit(0, "tied"), chain()[3], position, 3) == "4 bits, vocabulary"


def test_every_class_but_float_is_probed_with_units_spread_over_its_band() -> None:
    units, options = [unit(number) for number in range(30)], [chain() for _ in range(30)]
    sets = probe_sets(units, options, 3)
    assert sets.keys() == {
        f"{kind}, depth {third} of 3"
        for kind in ("2 bits", "4 bits", "6 bits", "8 bits", "low rank")
        for third in (1, 2, 3)
    }
    for kind, chosen in sets.items():
        price = sum(option.loss_nats for option in chosen.values())
        assert price == pytest.approx(0.08, abs=0.03), kind
    eight = sorted(int(name.removeprefix("unit.")) for name in sets["8 bits, depth 2 of 3"])
    assert len(eight) == 8
    assert eight[0] == 10
    assert eight[-1] in (18, 19)


def test_a_multiplier_is_measured_over_predicted_within_bounds() -> None:
    def probe(kind: str, predicted: float, measured: float) -> Probe:
        return Probe(kind=kind, predicted_nats=predicted, measured_nats=measured)

    found = multipliers(
        [probe("fair", 0.08, 0.12), probe("odd", 0.08, 80.0), probe("cheap", 0.08, 0.0), probe("free", 0.0, 0.1)]
    )
    assert found == pytest.approx({"fair": 1.5, "odd": 6.0, "cheap": 0.25})


def test_prices_are_multiplied_by_their_class_alone() -> None:
    units, options = [unit(0), unit(1)], [chain(), chain(2.0)]
    prices = [
        [option.loss_nats for option in one]
        for one in corrected(
            units,
            options,
            {"low rank, depth 1 of 2": 2.0, "low rank, depth 2 of 2": 2.0, "4 bits, depth 2 of 2": 3.0},
            2,
        )
    ]
    for number, scale in enumerate((1.0, 2.0)):
        expected = [scale * at / 100 for at in range(len(LABELS))]
        expected[5:] = [2 * price for price in expected[5:]]
        if number == 1:
            expected[3] *= 3
        assert prices[number] == pytest.approx(expected)


def test_one_costly_unit_is_no_probe_where_cheaper_ones_are() -> None:
    """Layers differ: a factored unit may cost as much as all others together."""
    units, options = (
        [unit(number) for number in range(30)],
        [chain(8.0 if number % 3 == 0 else 0.25) for number in range(30)],
    )
    chosen = probe_sets(units, options, 1)["low rank, depth 1 of 1"]
    assert len(chosen) >= 5
    assert all(int(name.removeprefix("unit.")) % 3 for name in chosen)
    every = probe_sets(units, [chain(8.0)] * 30, 1)["low rank, depth 1 of 1"]
    assert len(every) == 1
