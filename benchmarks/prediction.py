"""How far a map's predictions can be trusted: random assignments of options to units, and sizes along the map's curve.

    python benchmarks/prediction.py --model MODEL_FOLDER --map MAP [--calibration PATH …] [--windows N]
        [--state FILE] [--json FILE]

Each assignment goes into the torch model, with inputs rounded as the CPU's kernels round them. Predicted: the sum of
its prices, read off the map's anchors. Measured, in nats per token: the rise of the loss, and the divergence
KL(original ‖ now), which has far less noise. The text: windows of the calibration files that the map never saw
(--calibration names the files the map was scored with); without it the map's own held-out windows, on which its anchors
were measured.

Assignments are drawn in three ways, half of each above 4 bits per weight and half from 2.5 to 4:
    uniform    any of a unit's options up to a random number of bits
    shuffled   the map's moves in random order, up to a random size
    perturbed  a random prefix of the map, with a third of the units moved by one or two options
With --state FILE finished measurements are kept there, and an interrupted run goes on from them.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import make_parser, show, stored_weights, write_figures
from numpy.typing import NDArray
from safetensors import safe_open

from packager.io.files import sha256_json
from packager.planning.solver import choice_at, total_bytes, total_loss
from packager.scoremap.anchors import predicted_nats
from packager.scoremap.identity import require_model
from packager.scoremap.model import Option
from packager.scoremap.opening import OpenedMap, open_map
from packager.scoring.ledger import Ledger
from packager.scoring.probes import Observer, perturbed
from packager.source.calibration_text import WINDOW, load_calibration
from packager.source.checkpoint import Checkpoint, open_checkpoint
from packager.source.unit_weights import Source, find_sources, matrices_of
from packager.validation.measure_sizes import held_out_text

LOW, HIGH = "2.5 to 4 bits", "above 4 bits"
BANDS = {HIGH: (4.0, 10.0), LOW: (2.5, 4.0)}
SPEARMAN = {HIGH: 0.95, LOW: 0.85}
CURVE_ERROR = 0.15
_NOISY_NATS = 0.05  # where the map's anchors take the divergence for the rise, so does the error along its curve
_CURVE_BITS = (2.5, 10.0)

Choice = list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One assignment: how it was drawn, its band, and the option number of every unit."""

    kind: str
    band: str
    choice: Choice


def bits_of(loaded: OpenedMap, choice: Choice) -> float:
    return 8 * total_bytes(loaded.scoremap, choice) / sum(unit.elements for unit in loaded.scoremap.units)


def uniform(loaded: OpenedMap, generator: np.random.Generator) -> Choice:
    most, choice = float(np.exp(generator.uniform(np.log(2.2), np.log(33)))), []
    for unit, chain in zip(loaded.scoremap.units, loaded.scoremap.options, strict=True):
        allowed = [number for number, option in enumerate(chain) if 8 * option.bytes / unit.elements <= most] or [
            len(chain) - 1
        ]
        choice.append(int(generator.choice(allowed)))
    return choice


def shuffled(loaded: OpenedMap, generator: np.random.Generator) -> Choice:
    moves = loaded.scoremap.moves
    choice = [0] * len(loaded.scoremap.units)
    for number in generator.permutation(len(moves))[: generator.integers(len(moves) + 1)]:
        choice[moves[number].unit] += 1  # a unit's steps come in their own order, whichever of them is drawn
    return choice


def perturbed_prefix(loaded: OpenedMap, generator: np.random.Generator) -> Choice:
    choice = choice_at(loaded.scoremap, int(generator.integers(len(loaded.scoremap.moves) + 1)))
    for number, chain in enumerate(loaded.scoremap.options):
        if generator.random() < 1 / 3:
            choice[number] = int(np.clip(choice[number] + generator.choice([-2, -1, 1, 2]), 0, len(chain) - 1))
    return choice


DRAWS: dict[str, Callable[[OpenedMap, np.random.Generator], Choice]] = {
    "uniform": uniform,
    "shuffled": shuffled,
    "perturbed": perturbed_prefix,
}


def draw_cases(loaded: OpenedMap, count: int, seed: int) -> list[Case]:
    """`count` assignments, the kinds and bands in turn."""
    generator, cases = np.random.default_rng(seed), []
    wanted = [(kind, band) for kind in DRAWS for band in BANDS]
    for number in range(count):
        kind, band = wanted[number % len(wanted)]
        for _ in range(10_000):
            choice = DRAWS[kind](loaded, generator)
            if BANDS[band][0] <= bits_of(loaded, choice) < BANDS[band][1]:
                cases.append(Case(kind=kind, band=band, choice=choice))
                break
        else:
            raise SystemExit(f"this map has no {kind} assignment of {band}")
    return cases


def curve_cases(loaded: OpenedMap, count: int) -> list[Case]:
    """Prefixes of the map, evenly spread over those of 2.5 to 10 bits per weight."""
    prefixes = range(len(loaded.scoremap.moves) + 1)
    choices = [
        choice
        for choice in (choice_at(loaded.scoremap, prefix) for prefix in prefixes)
        if _CURVE_BITS[0] <= bits_of(loaded, choice) < _CURVE_BITS[1]
    ]
    positions = sorted({round(position) for position in np.linspace(0, len(choices) - 1, count)})
    return [Case(kind="curve", band="", choice=choices[position]) for position in positions]


def unseen_windows(checkpoint: Checkpoint, loaded: OpenedMap, paths: list[Path], count: int) -> torch.Tensor:
    """Windows of the calibration files that were neither calibrated on nor held out. The split depends on the seed
    alone."""
    settings, tokenizer = loaded.identity.settings, checkpoint.tokenizer()
    seen = load_calibration(paths, tokenizer, tokens=settings.tokens, seed=settings.seed)
    if seen.sha256 != loaded.identity.calibration.sha256:
        raise SystemExit(
            f"{', '.join(map(str, paths))} is not the text that this map was calibrated on "
            f"({loaded.identity.calibration.text}), in its order"
        )
    more = load_calibration(paths, tokenizer, tokens=settings.tokens + count * WINDOW, seed=settings.seed)
    unseen = more.windows[len(seen.windows) :]
    if len(unseen) < count:
        raise SystemExit(
            f"the calibration text has only {len(unseen)} windows of {WINDOW} tokens that the map has not seen: ask "
            "for fewer with --windows"
        )
    return unseen


def spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Rank correlation; measured values have no ties."""
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (first, second)])
    correlation: NDArray[np.float64] = np.atleast_2d(np.corrcoef(ranks))
    return float(correlation[0, 1])


def measure_cases(
    checkpoint: Checkpoint, loaded: OpenedMap, cases: list[Case], windows: torch.Tensor, ledger: Ledger | None
) -> list[dict[str, Any]]:
    """Each case's bits, prediction, divergence and rise, printed as they come."""
    model, units = checkpoint.load(), loaded.scoremap.units
    sources = find_sources(matrices_of((unit.matrix, unit.rows, unit.cols) for unit in units), model)
    if [source.unit for source in sources] != list(units):
        raise SystemExit("this version cuts the model into other units than the map does: score the model again")
    text = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    observer, results, started = Observer(model, windows), [], time.perf_counter()
    with safe_open(loaded.folder.store, framework="numpy") as store:

        def load(source: Source, option: Option) -> torch.Tensor:
            return stored_weights(store, source.unit, option.form)

        def ask(chosen: Mapping[str, Option]) -> tuple[float, float]:
            with torch.no_grad(), perturbed(model, sources, chosen, load):
                return observer.measure()

        for number, case in enumerate(cases, 1):
            chosen = {
                unit.name: chain[index]
                for unit, chain, index in zip(units, loaded.scoremap.options, case.choice, strict=True)
            }
            key = sha256_json(
                {
                    "map": loaded.sha256,
                    "text": text,
                    "forms": {name: option.form.label for name, option in chosen.items()},
                }
            )
            divergence, rise = ledger.recall(key, functools.partial(ask, chosen)) if ledger else ask(chosen)
            result = {
                "kind": case.kind,
                "band": case.band,
                "bits": bits_of(loaded, case.choice),
                "predicted_nats": predicted_nats(loaded.anchors, total_loss(loaded.scoremap, case.choice)),
                "divergence_nats": divergence,
                "rise_nats": rise,
            }
            results.append(result)
            figures = "  ".join(f"{name} {result[f'{name}_nats']:8.4f}" for name in ("predicted", "divergence", "rise"))
            print(
                f"{number:4} of {len(cases)}  {case.kind:9} {result['bits']:6.2f} bits  {figures}  "
                f"{time.perf_counter() - started:6.0f} s",
                flush=True,
            )
    return results


def column(results: list[dict[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([result[f"{name}_nats"] for result in results])


def main() -> None:
    parser = make_parser(__doc__, "model", "map", windows=4, json=None)
    parser.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        help="a file that the map was calibrated on; repeat as 'packager score' had it",
    )
    parser.add_argument("--assignments", type=int, default=120, help="random assignments (default: 120)")
    parser.add_argument("--sizes", type=int, default=24, help="prefixes of the map along its curve (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--state", type=Path, help="keep finished measurements here, and go on from them")
    arguments = parser.parse_args()

    checkpoint, loaded = open_checkpoint(str(arguments.model)), open_map(arguments.map)
    require_model(arguments.map, loaded.identity, checkpoint.name, checkpoint.sha256())
    if arguments.calibration:
        windows = unseen_windows(checkpoint, loaded, arguments.calibration, arguments.windows)
        text = f"{len(windows)} windows of 512 tokens of {loaded.identity.calibration.text} that the map never saw"
    else:
        windows = torch.from_numpy(held_out_text(loaded).windows)[: arguments.windows]
        text = (
            f"{len(windows)} of the map's held-out windows of {loaded.identity.calibration.text}, on "
            "which its anchors were measured"
        )
    cases = [*curve_cases(loaded, arguments.sizes), *draw_cases(loaded, arguments.assignments, arguments.seed)]
    results = measure_cases(checkpoint, loaded, cases, windows, Ledger(arguments.state) if arguments.state else None)

    rows = []
    for band in BANDS:
        chosen = [result for result in results if result["band"] == band]
        if len(chosen) < 3:
            continue
        found = [spearman(column(chosen, "predicted"), column(chosen, name)) for name in ("rise", "divergence")]
        rows.append(
            [f"Spearman, {band}", str(len(chosen)), *(f"{value:.3f}" for value in found), f"≥ {SPEARMAN[band]}"]
        )
    curve = [result for result in results if result["kind"] == "curve"]
    predicted, rise, divergence = (column(curve, name) for name in ("predicted", "rise", "divergence"))
    errors = [
        np.median(np.abs(predicted / measured - 1))
        for measured in (np.where(rise > _NOISY_NATS, rise, divergence), divergence)
    ]
    rows.append(
        [
            "median relative error along the map's curve",
            str(len(curve)),
            *(f"{value:.1%}" for value in errors),
            f"≤ {CURVE_ERROR:.0%}",
        ]
    )
    show(
        f"{loaded.identity.model.name}, {arguments.map.name}: predicted against measured on {text}; * on the curve: "
        f"against the rise, but below {_NOISY_NATS} nats against the divergence",
        ["", "assignments", "rise *", "divergence", "wanted"],
        rows,
    )
    write_figures(arguments.json, results)


if __name__ == "__main__":
    main()
