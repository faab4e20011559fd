"""Ways to make a model smaller, side by side: ACIP, low rank whitened by H, low rank under curvature, the full map.

    python benchmarks/methods.py --model MODEL_FOLDER --map MAP --calibration TEXT… --text TEXT [--json FILE]

At equal parameters every method keeps the same share of the linear layers' elements, in float. At equal bytes factors
are 4-bit codes in blocks of 32, layers that stay whole 4-bit codes in blocks of 64, and the full map chooses among all
its options; sizes are shares of all layers whole at 4 bits. The vocabulary stays float throughout. Each method orders
its own cuts in one global list; losses are torch's, on the second half of each window of 512 tokens.

The settings of ACIP here are far below those published (see --help): steps, tokens and adapters that two cores can
bear.
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
from common import show, torch_losses
from safetensors import safe_open

from packager.cli.progress_bars import Bars
from packager.forms.blocks import BlockForm
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import Form, form_bytes
from packager.graph.skeleton import Matrix
from packager.planning.size_curve import standard_error
from packager.planning.solver import solve, total_bytes
from packager.scoremap.folder import MapFolder, store_key
from packager.scoremap.model import Option, ScoreMap, Unit, make_map
from packager.scoremap.opening import open_map
from packager.scoremap.settings import BASES, QUICK_ACIP, AcipSettings
from packager.scoring.acip.options import Ranking, folded, rank_units, start_of
from packager.scoring.acip.training import Start, train
from packager.scoring.curvature.moments import Curvature, collect
from packager.scoring.factors import low_rank, pivoted, stored
from packager.scoring.low_rank import Spectrum, decompose
from packager.scoring.rounding import Feedback, feedback
from packager.source.calibration_text import load_calibration, text_windows
from packager.source.checkpoint import open_checkpoint
from packager.source.unit_weights import Source, find_sources

FLOAT, WHOLE, FACTORS = (
    FloatForm(label="f32"),
    BlockForm(bits=4, block=64, zeros=True),
    BlockForm(bits=4, block=32, zeros=True),
)


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
def made(method: Method, weights: torch.Tensor, error_feedback: Feedback, unit: Unit, form: Form) -> torch.Tensor:
    """The matrix that a unit in `form` multiplies by."""
    if isinstance(form, FloatForm | BlockForm):
        return stored(weights, form, error_feedback)[0]
    assert isinstance(form, LowRankForm | PivotForm)
    pair = method.pair(unit.name, form.rank)
    product = pair.left @ pair.right
    if isinstance(form.factors, FloatForm):
        return product
    target = weights if method.refitted else product
    make: Any = pivoted if isinstance(form, PivotForm) else low_rank
    values: torch.Tensor = make(target, pair, form, error_feedback)[0]
    return values


@torch.no_grad()
def rise_with(
    model: Any, sources: Sequence[Source], weights: Callable[[Source], torch.Tensor], windows: Any, original: Any
) -> Any:
    """Rise of each window's loss with other weights, which are taken back."""
    saved = [source.weight(model).clone() for source in sources]
    try:
        for source in sources:
            source.weight(model).copy_(weights(source))
        return torch_losses(model, windows) - original
    finally:
        for source, tensor in zip(sources, saved, strict=True):
            source.weight(model).copy_(tensor)


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


def from_store(folder: Path, unit: Unit, form: Form) -> torch.Tensor:
    """A unit's weights as a map's store holds them."""
    with safe_open(MapFolder(root=folder).store, framework="numpy") as file:
        tensors = {
            name: file.get_tensor(store_key(unit.name, form.label, name)) for name in form.tensors(unit.rows, unit.cols)
        }
    return torch.from_numpy(form.dequantize(tensors, unit.rows, unit.cols))


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
        steps = f"{outcome.pruning_steps} + {settings.tuning_steps} steps of {settings.step_tokens} tokens"
        found.append(
            acip_method(
                f"ACIP from the {basis} ({steps}, adapters of {settings.adapter_rank})",
                starts,
                rankings,
                settings.adapter_rank,
            )
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--map", type=Path, required=True, help="the full map, from 'packager score'")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens (default: 8192)")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument(
        "--parameters", type=float, nargs="+", default=[0.9, 0.8, 0.6], help="shares of the layers' elements"
    )
    parser.add_argument(
        "--bytes", type=float, nargs="+", default=[0.75, 0.6], help="shares of the layers' bytes, all whole at 4 bits"
    )
    parser.add_argument("--acip-basis", nargs="+", choices=BASES, default=["weights"], help="as published: weights")
    parser.add_argument(
        "--acip-steps", type=int, default=QUICK_ACIP.steps, help=f"published 2,000 or so (default: {QUICK_ACIP.steps})"
    )
    parser.add_argument(
        "--acip-tokens",
        type=int,
        default=QUICK_ACIP.step_tokens,
        help=f"published 4,096 (default: {QUICK_ACIP.step_tokens})",
    )
    parser.add_argument(
        "--acip-tuning",
        type=int,
        default=QUICK_ACIP.tuning_steps,
        help=f"published 1,000 (default: {QUICK_ACIP.tuning_steps})",
    )
    parser.add_argument(
        "--acip-rank",
        type=int,
        default=QUICK_ACIP.adapter_rank,
        help=f"published 32 (default: {QUICK_ACIP.adapter_rank})",
    )
    parser.add_argument(
        "--acip-rate",
        type=float,
        default=QUICK_ACIP.adapter_rate,
        help=f"published 5e-5 (default: {QUICK_ACIP.adapter_rate})",
    )
    parser.add_argument(
        "--acip-stop",
        type=float,
        default=QUICK_ACIP.stop_ratio,
        help=f"published 0.4 (default: {QUICK_ACIP.stop_ratio})",
    )
    parser.add_argument(
        "--state", type=Path, default=Path("methods.acip"), help="where ACIP's training is kept and resumed from"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    started = time.perf_counter()
    checkpoint, loaded = open_checkpoint(str(arguments.model)), open_map(arguments.map)
    model, tokenizer = checkpoint.load(), checkpoint.tokenizer()
    windows = text_windows(arguments.text, tokenizer, arguments.windows).numpy()
    original = torch_losses(model, windows)
    calibration = load_calibration(arguments.calibration, tokenizer, tokens=arguments.tokens, seed=0)
    rows: dict[str, Matrix] = {}
    for unit in loaded.scoremap.units:
        rows[unit.matrix] = Matrix(
            name=unit.matrix, rows=unit.rows + (rows[unit.matrix].rows if unit.matrix in rows else 0), cols=unit.cols
        )
    sources = [source for source in find_sources(list(rows.values()), model) if source.unit.kind == "linear"]
    units = [source.unit for source in sources]
    whole = {
        label: sum(form_bytes(form, unit.rows, unit.cols) for unit in units)
        for label, form in (("f32", FLOAT), ("q4", WHOLE))
    }
    with Bars() as bars:
        bars.phase(f"measuring curvature on {calibration.description}", len(calibration.windows))
        curvature = collect(
            model, sources, calibration.windows, blocks=(), batch=1, progress=lambda count: bars.advance()
        )
        feedbacks = {name: feedback(item.rounding) for name, item in curvature.items()}
        ways = methods(arguments, model, sources, curvature, calibration.windows, bars)
        tables: dict[str, list[list[str]]] = {"parameters": [], "bytes": []}
        data: list[dict[str, Any]] = []
        bars.phase(
            "measuring losses", len(ways) * (len(arguments.parameters) + len(arguments.bytes)) + len(arguments.bytes)
        )

        def measured(
            name: str,
            budget: str,
            share: float,
            taken: dict[str, Option] | None,
            weights: Callable[[Source], torch.Tensor],
        ) -> str:
            bars.advance()
            if taken is None:
                return "does not reach it"
            rise = rise_with(model, sources, weights, windows, original)
            kept = sum(option.bytes for option in taken.values())
            data.append(
                {
                    "method": name,
                    "equal": budget,
                    "share": share,
                    "bytes": kept,
                    "rise_nats": rise.mean(),
                    "noise_nats": standard_error(rise),
                }
            )
            return f"{rise.mean():.3f} ± {standard_error(rise):.3f} (× {np.exp(rise.mean()):.2f})"

        for way in ways:
            for budget, form, factors, shares in (
                ("parameters", FLOAT, FLOAT, arguments.parameters),
                ("bytes", WHOLE, FACTORS, arguments.bytes),
            ):
                options = [way.options(unit, form, factors) for unit in units]
                cells = []
                for share in shares:
                    taken = chosen(units, options, int(share * whole["f32" if budget == "parameters" else "q4"]))

                    def weights(
                        source: Source, way: Method = way, taken: dict[str, Option] | None = taken
                    ) -> torch.Tensor:
                        assert taken is not None
                        return made(
                            way,
                            source.weight(model),
                            feedbacks[source.unit.name],
                            source.unit,
                            taken[source.unit.name].form,
                        )

                    cells.append(measured(way.name, budget, share, taken, weights))
                tables[budget].append([way.name, *cells])
        chains = dict(zip((unit.name for unit in loaded.scoremap.units), loaded.scoremap.options, strict=True))
        cells = []
        for share in arguments.bytes:
            taken = chosen(units, [chains[unit.name] for unit in units], int(share * whole["q4"]))

            def from_map(source: Source, taken: dict[str, Option] | None = taken) -> torch.Tensor:
                assert taken is not None
                return from_store(arguments.map, source.unit, taken[source.unit.name].form)

            cells.append(measured("full map", "bytes", share, taken, from_map))
        tables["bytes"].append(["full map", *cells])
    about = (
        f"{len(windows)} windows of 512 tokens of {arguments.text.name}, second half scored; source "
        f"{original.mean():.4f}; rise in nats per token"
    )
    calibrated = f"calibrated on {calibration.windows.numel():,} tokens; {time.perf_counter() - started:.0f} s in all"
    header = ["method", *(f"{share:.0%} of the elements" for share in arguments.parameters)]
    show(
        f"{about} (× perplexity); {calibrated}\n\nAt equal parameters of the linear layers, float",
        header,
        tables["parameters"],
        None,
        data,
    )
    sizes = [f"{share:.0%}: {int(share * whole['q4']):,}" for share in arguments.bytes]
    show(
        "At equal bytes of the linear layers, factors in 4 bits",
        ["method", *sizes],
        tables["bytes"],
        arguments.json,
        data,
    )


if __name__ == "__main__":
    main()
