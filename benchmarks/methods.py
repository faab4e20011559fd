"""Ways to make a model smaller, side by side: ACIP, low rank whitened by H, low rank under curvature, the full map.

    python benchmarks/methods.py --model MODEL_FOLDER --map MAP --calibration TEXT… --text TEXT [--windows N]
        [--acip-steps N …] [--json FILE]

At equal parameters every method keeps the same share of the linear layers' elements, in float. At equal bytes, factors
are 4-bit codes in blocks of 32, layers that stay whole are 4-bit codes in blocks of 64, and the full map chooses among
all its options; sizes are shares of all layers whole at 4 bits. The vocabulary stays float throughout. Each method
orders its own cuts in one global list; losses are torch's, on the second half of each window of 512 tokens.

ACIP runs with far fewer steps, tokens and smaller adapters than published (see --help): as many as two cores can bear.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Subject, about_windows, make_parser, open_subject, show, stored_weights, torch_losses, write_figures
from safetensors import safe_open

from packager.cli.progress_bars import Bars
from packager.forms.blocks import BlockForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import Form, form_bytes
from packager.planning.size_curve import standard_error
from packager.planning.solver import solve, total_bytes
from packager.scoremap.model import Option, ScoreMap, Unit, make_map
from packager.scoremap.settings import BASES, QUICK_ACIP, AcipSettings
from packager.scoring.acip.options import Ranking, folded, rank_units, start_of
from packager.scoring.acip.training import Start, train
from packager.scoring.curvature.moments import Curvature, collect
from packager.scoring.factors import low_rank, pivoted, stored
from packager.scoring.low_rank import Spectrum, decompose
from packager.scoring.probes import Load, perturbed
from packager.scoring.rounding import Feedback, feedback
from packager.source.calibration_text import load_calibration
from packager.source.unit_weights import Source, find_sources, matrices_of

FLOAT, WHOLE, FACTORS = (
    FloatForm(label="f32"),
    BlockForm(bits=4, block=64, zeros=True),
    BlockForm(bits=4, block=32, zeros=True),
)
_ACIP = {
    "steps": "2,000 or so",
    "tokens": "4,096",
    "tuning": "1,000",
    "rank": "32",
    "rate": "5e-5",
    "stop": "0.4",
}
"""What of ACIP's settings can be chosen here, and the published values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How a unit is cut: what keeping `rank` costs (in the method's own order), and the pair of factors it keeps.

    `refitted` factors approximate the unit's weights; others (ACIP's, adapters and all) stand for themselves.
    """

    name: str
    price: Callable[[str, int], float]
    pair: Callable[[str, int], Spectrum]
    pivot: bool = False
    refitted: bool = True
    least_rank: int = 1

    def form(self, rank: int, factors: FloatForm | BlockForm) -> Form:
        """The form that keeps `rank`."""
        return PivotForm(rank=rank, factors=factors) if self.pivot else LowRankForm(rank=rank, factors=factors)

    def ranks(self, unit: Unit) -> range:
        """Multiples of the factors' block that take fewer elements than the unit."""
        most = min(unit.rows, unit.cols) - 1 if self.pivot else (unit.elements - 1) // (unit.rows + unit.cols)
        first = -(-self.least_rank // FACTORS.block) * FACTORS.block
        return range(first, most + 1, FACTORS.block)

    def options(self, unit: Unit, whole: FloatForm | BlockForm, factors: FloatForm | BlockForm) -> list[Option]:
        """The whole unit, and every rank."""
        prices = {whole: 0.0} | {self.form(rank, factors): self.price(unit.name, rank) for rank in self.ranks(unit)}
        return [
            Option(form=form, bytes=form_bytes(form, unit.rows, unit.cols), loss_nats=price)
            for form, price in prices.items()
        ]


def factored_method(name: str, spectra: Mapping[str, Spectrum], *, pivot: bool = False) -> Method:
    """Truncation of each unit's decomposition, by what the dropped components cost."""
    left_over = {
        unit: torch.flip(torch.cumsum(torch.flip(spectrum.costs, [0]), 0), [0]).tolist()
        for unit, spectrum in spectra.items()
    }

    def pair(unit: str, rank: int) -> Spectrum:
        spectrum = spectra[unit]
        return Spectrum(left=spectrum.left[:, :rank], right=spectrum.right[:rank], costs=spectrum.costs[:rank])

    return Method(name=name, price=lambda unit, rank: left_over[unit][rank], pair=pair, pivot=pivot)


def acip_method(name: str, starts: Mapping[str, Start], rankings: Mapping[str, Ranking], adapter_rank: int) -> Method:
    """ACIP's order, its adapters folded in."""

    def pair(unit: str, rank: int) -> Spectrum:
        ranking, kept = rankings[unit], rank - adapter_rank
        return folded(starts[unit], ranking.directions[:kept], ranking.adapter, float(ranking.strength[kept]))

    def price(unit: str, rank: int) -> float:
        return float(rankings[unit].nats[rank - adapter_rank])

    return Method(name=name, price=price, pair=pair, refitted=False, least_rank=adapter_rank)


def chosen(units: Sequence[Unit], options: Sequence[Sequence[Option]], limit: int) -> dict[str, Option] | None:
    """The best choice of at most `limit` bytes, or None."""
    scoremap: ScoreMap = make_map(units, options)
    solution = solve(scoremap, lambda choice: total_bytes(scoremap, choice) <= limit)
    if solution is None:
        return None
    return {
        unit.name: chain[taken] for unit, chain, taken in zip(units, scoremap.options, solution.choice, strict=True)
    }


@torch.no_grad()
def made(method: Method, weights: torch.Tensor, spread: Feedback, unit: Unit, form: Form) -> torch.Tensor:
    """The matrix that a unit in `form` multiplies by."""
    if isinstance(form, FloatForm | BlockForm):
        return stored(weights, form, spread)[0]
    assert isinstance(form, LowRankForm | PivotForm)
    pair = method.pair(unit.name, form.rank)
    product = pair.left @ pair.right
    if isinstance(form.factors, FloatForm):
        return product
    target = weights if method.refitted else product
    make: Any = pivoted if isinstance(form, PivotForm) else low_rank
    values: torch.Tensor = make(target, pair, form, spread)[0]
    return values


@torch.no_grad()
def input_moments(model: Any, sources: Sequence[Source], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """E[x xᵀ] of each unit's inputs, every token alike: what is known without gradients."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).float()
            sums[name] = sums[name].addmm_(rows.T, rows) if name in sums else rows.T @ rows

        return add

    names = dict.fromkeys(source.module for source in sources)
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for window in windows:
        model(input_ids=window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {source.unit.name: sums[source.module] / windows.numel() for source in sources}


def acip_defaults(settings: AcipSettings) -> dict[str, int | float]:
    """The settings that can be chosen here, by the names of `_ACIP`."""
    return {
        "steps": settings.steps,
        "tokens": settings.step_tokens,
        "tuning": settings.tuning_steps,
        "rank": settings.adapter_rank,
        "rate": settings.adapter_rate,
        "stop": settings.stop_ratio,
    }


def acip_settings(arguments: argparse.Namespace, basis: str) -> AcipSettings:
    """What the command line says."""
    return AcipSettings(
        basis=basis,
        steps=arguments.acip_steps,
        step_tokens=arguments.acip_tokens,
        tuning_steps=arguments.acip_tuning,
        adapter_rank=arguments.acip_rank,
        adapter_rate=arguments.acip_rate,
        stop_ratio=arguments.acip_stop,
    )


def methods(
    arguments: argparse.Namespace,
    model: Any,
    sources: Sequence[Source],
    curvature: Mapping[str, Curvature],
    windows: torch.Tensor,
    bars: Bars,
) -> list[Method]:
    """All that cut by rank, each with its whole order."""
    found = []
    for basis in arguments.acip_basis:
        settings = acip_settings(arguments, basis)
        starts = {
            source.unit.name: start_of(source.weight(model), curvature[source.unit.name], basis) for source in sources
        }
        state = arguments.state.with_name(f"{arguments.state.name}-{basis}.safetensors")
        outcome = train(
            model, sources, starts, windows, settings, seed=0, adapt_whole=False, state=state, progress=bars
        )
        rankings = rank_units(outcome, {name: start.costs.double().numpy() for name, start in starts.items()}, settings)
        print(
            f"ACIP from the {basis}: {outcome.pruning_steps} + {settings.tuning_steps} steps of "
            f"{settings.step_tokens} tokens, adapters of rank {settings.adapter_rank}",
            flush=True,
        )
        found.append(acip_method(f"ACIP from the {basis}", starts, rankings, settings.adapter_rank))
    bars.phase("taking layers apart", 2 * len(sources))
    spectra: dict[str, dict[str, Spectrum]] = {"h": {}, "gh": {}}
    moments = input_moments(model, sources, windows)
    for source in sources:
        name, weights = source.unit.name, source.weight(model)
        spectra["h"][name] = decompose(weights, moments.pop(name), torch.eye(len(weights)))
        spectra["gh"][name] = decompose(weights, *curvature[name].pairs[0])
        bars.advance(2)
    found.append(factored_method("low rank whitened by H, pairs", spectra["h"]))
    found.append(factored_method("low rank under G and H, pairs", spectra["gh"]))
    found.append(factored_method("low rank under G and H, pivots", spectra["gh"], pivot=True))
    return found


@dataclasses.dataclass(kw_only=True)
class Table:
    """The losses of every method, measured one by one; `rows` as they are printed, `data` as they are written."""

    subject: Subject
    model: torch.nn.Module
    sources: Sequence[Source]
    equal: str
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    data: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(
        self, name: str, options: Sequence[Sequence[Option]], limits: Mapping[float, int], load: Load, bars: Bars
    ) -> None:
        """A row: the best choice among `options` within each of `limits`, bytes by share."""
        units, cells = [source.unit for source in self.sources], []
        for share, limit in limits.items():
            taken = chosen(units, options, limit)
            cells.append("out of reach" if taken is None else self._measured(name, share, taken, load))
            bars.advance()
        self.rows.append([name, *cells])

    def _measured(self, name: str, share: float, taken: Mapping[str, Option], load: Load) -> str:
        with torch.no_grad(), perturbed(self.model, self.sources, taken, load, rounds_inputs=False):
            rise = torch_losses(self.model, self.subject.windows) - self.subject.original
        mean, noise = float(rise.mean()), standard_error(rise)
        self.data.append(
            {
                "method": name,
                "equal": self.equal,
                "share": share,
                "bytes": sum(option.bytes for option in taken.values()),
                "rise_nats": mean,
                "noise_nats": noise,
            }
        )
        return f"{mean:.3f} ± {noise:.3f} (× {np.exp(mean):.2f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only this benchmark asks for."""
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens (default: 8192)")
    for name, shares, of in (
        ("parameters", [0.9, 0.8, 0.6], "elements"),
        ("bytes", [0.75, 0.6], "bytes, all whole at 4 bits"),
    ):
        about = f"shares of the layers' {of} (default: {shares})"
        parser.add_argument(f"--{name}", type=float, nargs="+", default=shares, help=about)
    parser.add_argument("--acip-basis", nargs="+", choices=BASES, default=["weights"], help="as published: weights")
    quick = acip_defaults(QUICK_ACIP)
    for name, published in _ACIP.items():
        default = quick[name]
        about = f"published {published} (default: {default})"
        parser.add_argument(f"--acip-{name}", type=type(default), default=default, help=about)
    parser.add_argument(
        "--state", type=Path, default=Path("methods.acip"), help="where ACIP's training is kept and resumed from"
    )


def main() -> None:
    parser = make_parser(__doc__, "model", "map", "text", windows=8, json=None)
    add_arguments(parser)
    arguments = parser.parse_args()

    started = time.perf_counter()
    subject = open_subject(arguments)
    scoremap, model = subject.map.scoremap, subject.checkpoint.load()
    calibration = load_calibration(
        arguments.calibration, subject.checkpoint.tokenizer(), tokens=arguments.tokens, seed=0
    )
    matrices = matrices_of((unit.matrix, unit.rows, unit.cols) for unit in scoremap.units)
    sources = [source for source in find_sources(matrices, model) if source.unit.kind == "linear"]
    units = [source.unit for source in sources]
    limits: dict[str, dict[float, int]] = {}
    for equal, form in (("parameters", FLOAT), ("bytes", WHOLE)):
        whole = sum(form_bytes(form, unit.rows, unit.cols) for unit in units)
        limits[equal] = {share: int(share * whole) for share in getattr(arguments, equal)}
    tables = {equal: Table(subject=subject, model=model, sources=sources, equal=equal) for equal in limits}
    with Bars() as bars, safe_open(subject.map.folder.store, framework="numpy") as store:
        bars.phase(f"measuring curvature on {calibration.description}", len(calibration.windows))
        curvature = collect(
            model, sources, calibration.windows, blocks=(), batch=1, progress=lambda count: bars.advance()
        )
        spreads = {name: feedback(item.rounding) for name, item in curvature.items()}
        ways = methods(arguments, model, sources, curvature, calibration.windows, bars)
        bars.phase("measuring losses", len(ways) * sum(map(len, limits.values())) + len(limits["bytes"]))
        for way in ways:

            def make(source: Source, option: Option, way: Method = way) -> torch.Tensor:
                return made(way, source.weight(model), spreads[source.unit.name], source.unit, option.form)

            for equal, form, factors in (("parameters", FLOAT, FLOAT), ("bytes", WHOLE, FACTORS)):
                options = [way.options(unit, form, factors) for unit in units]
                tables[equal].add(way.name, options, limits[equal], make, bars)

        def load(source: Source, option: Option) -> torch.Tensor:
            return stored_weights(store, source.unit, option.form)

        chains = dict(zip((unit.name for unit in scoremap.units), scoremap.options, strict=True))
        tables["bytes"].add("full map", [chains[unit.name] for unit in units], limits["bytes"], load, bars)
    calibrated = f"calibrated on {calibration.windows.numel():,} tokens; {time.perf_counter() - started:.0f} s in all"
    print(f"\n{about_windows(subject, arguments.text)}; rise in nats per token (× perplexity); {calibrated}")
    show(
        "At equal parameters of the linear layers, float",
        ["method", *(f"{share:.0%} of the elements" for share in limits["parameters"])],
        tables["parameters"].rows,
    )
    show(
        "At equal bytes of the linear layers, factors in 4 bits",
        ["method", *(f"{share:.0%}: {limit:,}" for share, limit in limits["bytes"].items())],
        tables["bytes"].rows,
    )
    write_figures(arguments.json, [entry for table in tables.values() for entry in table.data])


if __name__ == "__main__":
    main()
