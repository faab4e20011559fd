"""ACIP on pico models: training, stopping, resuming, and the options its order becomes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from made_up import correlated, matrices_of, weights_of
from torch import Tensor

import packager.scoring.acip.training as acip
from packager.errors import CalibrationError, UsageError
from packager.forms.codes import BLOCKS
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.progress import Silent
from packager.scoremap.model import Option, Unit, make_map
from packager.scoremap.settings import PUBLISHED_STEPS, AcipSettings, Kernels
from packager.scoring.acip.gates import OPEN, SCALE, Schedule, kept_share, total_order
from packager.scoring.acip.options import folded, rank_units, ranked_options, ranks_for, start_of
from packager.scoring.acip.training import (
    Adapter,
    Outcome,
    Start,
    check_reachable,
    train,
)
from packager.scoring.curvature.moments import Curvature, collect
from packager.scoring.rounding import price
from packager.source.unit_weights import Source, find_sources

SETTINGS = AcipSettings(steps=24, step_tokens=96, tuning_steps=6, adapter_rank=2, adapter_rate=5e-4)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A pico model, its linear units, their starts, and text to train on."""

    model: torch.nn.Module
    sources: list[Source]
    starts: dict[str, Start]
    windows: Tensor


def make_case(name: str = "llama", basis: str = "curvature", device: str = "cpu") -> Case:
    model = random_model(name).to(device)
    sources = [source for source in find_sources(matrices_of(model), model) if source.unit.kind == "linear"]
    windows = torch.randint(2, 384, (6, 64), generator=torch.Generator().manual_seed(0))
    curvature = collect(model, sources, windows, blocks=(), batch=2, progress=lambda count: None)
    starts = {
        source.unit.name: start_of(source.weight(model), curvature[source.unit.name], basis) for source in sources
    }
    return Case(model=model, sources=sources, starts=starts, windows=windows)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case()


def run(
    case: Case,
    state: Path,
    settings: AcipSettings = SETTINGS,
    *,
    seed: int = 0,
    progress: Any = None,
    adapt_whole: bool = True,
) -> Outcome:
    listener = progress or Silent()
    return train(
        case.model,
        case.sources,
        case.starts,
        case.windows,
        settings,
        seed=seed,
        adapt_whole=adapt_whole,
        state=state / "acip.safetensors",
        progress=listener,
    )


def same(one: Outcome, other: Outcome) -> bool:
    fates = all(
        np.array_equal(getattr(fate, field), getattr(other.fates[name], field))
        for name, fate in one.fates.items()
        for field in ("mask", "pruned", "fell_to")
    )
    adapters = all(
        torch.equal(item.up, other.adapters[name].up) and torch.equal(item.down, other.adapters[name].down)
        for name, item in one.adapters.items()
    )
    return fates and adapters and one.pruning_steps == other.pruning_steps


def logits_of(case: Case) -> Tensor:
    with torch.no_grad():
        logits: Tensor = case.model(
            input_ids=case.windows[:1].to(next(case.model.parameters()).device), use_cache=False
        ).logits
    return logits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "basis"), [("llama", "curvature"), ("llama", "weights"), ("qwen2", "curvature")])
def test_a_model_of_open_gates_is_the_model(name: str, basis: str, device: str) -> None:
    case = make_case(name, basis, device)
    before = logits_of(case)
    with acip._gated(case.model, case.sources, case.starts, SETTINGS, 0) as gated:
        assert gated.share == 1.0
        torch.testing.assert_close(logits_of(case), before, atol=2e-3 * float(before.abs().max()), rtol=0)
        for part in gated.parts:  # an adapter begins with nothing
            assert not part.up.any()
            assert part.down.any()
    assert torch.equal(logits_of(case), before)


def test_rows_that_share_a_layer_are_gated_apart() -> None:
    case = make_case()
    names = ("gate_proj", "up_proj")
    with acip._gated(case.model, case.sources, case.starts, SETTINGS, 0) as gated:
        parts = {part.name: part for part in gated.parts}
        inputs = torch.randn(3, 64)
        both = [parts[f"model.layers.0.mlp.{name}"] for name in names]
        packed = acip._GatedLinear(both, None, gated.noise)
        weights = torch.cat(
            [
                case.model.get_submodule(f"model.layers.0.mlp.{name}").parts[0].left @ both[i].right * SCALE
                for i, name in enumerate(names)
            ]
        )  # type: ignore[union-attr, index, operator]
        torch.testing.assert_close(packed(inputs), inputs @ weights.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_it_prunes_to_the_stop_ratio_and_leaves_the_model_as_it_was(device: str, tmp_path: Path) -> None:
    case = make_case(device=device)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    outcome = run(case, tmp_path)
    shapes = [fate.shape for fate in outcome.fates.values()]
    ranks = [int((fate.pruned == OPEN).sum()) for fate in outcome.fates.values()]
    assert kept_share(shapes, ranks, SETTINGS.adapter_rank) <= SETTINGS.stop_ratio
    for fate in outcome.fates.values():
        assert fate.mask.dtype == np.float32
        assert ((fate.mask > 0) == (fate.pruned == OPEN)).all()
        assert (fate.fell_to[fate.pruned != OPEN] <= 0).all()
        assert fate.pruned.max() < outcome.pruning_steps
        assert len(set(fate.mask.tolist())) > 1, "no mask moved"
    assert all(adapter.up.any() for adapter in outcome.adapters.values())
    after = case.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert all(parameter.requires_grad for parameter in case.model.parameters())


def test_tuning_moves_adapters_and_no_mask(case: Case, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    pruned = run(case, tmp_path / "one", dataclasses.replace(SETTINGS, tuning_steps=0))
    tuned = run(case, tmp_path / "two")
    for name, fate in pruned.fates.items():
        assert np.array_equal(fate.mask, tuned.fates[name].mask)
        assert np.array_equal(fate.pruned, tuned.fates[name].pruned)
        assert not torch.equal(pruned.adapters[name].up, tuned.adapters[name].up)


def loss_with(case: Case, weights: dict[str, Tensor]) -> float:
    """Mean loss on the text with other weights in the linear layers."""
    saved = {source.unit.name: source.weight(case.model).clone() for source in case.sources}
    with torch.no_grad():
        for source in case.sources:
            source.weight(case.model).copy_(weights[source.unit.name])
        logits = case.model(input_ids=case.windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = float(torch.nn.functional.cross_entropy(logits, case.windows[:, 1:].flatten()))
        for source in case.sources:
            source.weight(case.model).copy_(saved[source.unit.name])
    return loss


def test_tuned_adapters_make_the_pruned_model_better(case: Case, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, tuning_steps=60, adapter_rank=4, adapter_rate=2e-3)
    outcome = run(case, tmp_path, settings)
    bare, adapted = {}, {}
    for name, fate in outcome.fates.items():
        start, adapter = case.starts[name], outcome.adapters[name]
        kept = torch.from_numpy(fate.mask > 0)
        whole = (int(kept.sum()) + 4) * sum(fate.shape) >= fate.shape[0] * fate.shape[1]
        bare[name] = start.left @ start.right * SCALE if whole else start.left[:, kept] @ start.right[kept] * SCALE
        adapted[name] = bare[name] + adapter.up @ adapter.down
    assert loss_with(case, adapted) < loss_with(case, bare) - 0.1


def test_what_the_loss_does_not_hold_up_goes_first(tmp_path: Path) -> None:
    model = random_model("llama")
    generator = torch.Generator().manual_seed(5)
    sources = [source for source in find_sources(matrices_of(model), model) if source.unit.kind == "linear"]
    with torch.no_grad():
        for source in sources:  # eight directions carry all, the others next to nothing
            unit = source.unit
            strong = (
                torch.randn(unit.rows, 8, generator=generator)
                @ torch.randn(8, unit.cols, generator=generator)
                / (8 * unit.cols) ** 0.5
            )
            source.weight(model).copy_(
                strong + 1e-3 * torch.randn(unit.rows, unit.cols, generator=generator) / unit.cols**0.5
            )
    windows = torch.randint(2, 384, (6, 64), generator=torch.Generator().manual_seed(0))
    curvature = collect(model, sources, windows, blocks=(), batch=2, progress=lambda count: None)
    starts = {
        source.unit.name: start_of(source.weight(model), curvature[source.unit.name], "weights") for source in sources
    }
    case = Case(model=model, sources=sources, starts=starts, windows=windows)
    outcome = run(case, tmp_path, dataclasses.replace(SETTINGS, steps=80, tuning_steps=0, stop_ratio=0.5))
    order = total_order(outcome.fates, Schedule.of(SETTINGS), SETTINGS.mask_rate)
    strong_places = np.flatnonzero(order.directions < 8) / len(order.directions)
    weak_places = np.flatnonzero(order.directions >= 8) / len(order.directions)
    assert np.median(weak_places) < 0.45
    assert np.median(strong_places) > 0.7


class Stop:
    """Raises KeyboardInterrupt when the `moment`-th step is reported."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def phase(self, name: str, total: int) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        self.left -= steps > 0
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("save_seconds", [0.0, 1e9])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float
) -> None:
    monkeypatch.setattr(acip, "_SAVE_SECONDS", save_seconds)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run(case, tmp_path / "whole")
    stops = 0
    for moment in (1, 3, whole.pruning_steps // 2, whole.pruning_steps // 4, 3):
        try:
            run(case, tmp_path / "parts", progress=Stop(moment))
        except KeyboardInterrupt:
            stops += 1
        assert not any(isinstance(module, acip._GatedLinear) for module in case.model.modules())
        assert all(parameter.requires_grad for parameter in case.model.parameters())
    assert stops >= 4
    assert same(run(case, tmp_path / "parts"), whole)
    assert same(run(case, tmp_path / "parts"), whole), "a run that had ended does nothing more"


def test_seeds(case: Case, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    first, again, other = (run(case, folder, seed=seed) for folder, seed in zip(folders, (1, 1, 2), strict=True))
    assert same(first, again)
    assert not same(first, other)


def test_passes_count_as_one_step(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory's bound on a pass changes neither the schedule nor, but for the adapters' noise, the step."""
    settings = dataclasses.replace(SETTINGS, step_tokens=256, dropout=0.0, tuning_steps=2)
    outcomes = []
    for name, tokens in (("one", 2048), ("four", 64)):
        monkeypatch.setattr(acip, "_PASS_TOKENS", tokens)
        (tmp_path / name).mkdir()
        outcomes.append(run(case, tmp_path / name, settings))
    assert outcomes[0].pruning_steps == outcomes[1].pruning_steps
    pruned = [np.concatenate([fate.pruned for fate in outcome.fates.values()]) for outcome in outcomes]
    assert np.mean(pruned[0] == pruned[1]) > 0.97


def test_a_target_below_what_adapters_alone_keep_is_an_error_with_the_minimum(case: Case, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, stop_ratio=0.05)
    with pytest.raises(UsageError) as caught:
        run(case, tmp_path, settings)
    least = kept_share([(source.unit.rows, source.unit.cols) for source in case.sources], [0] * len(case.sources), 2)
    assert str(caught.value) == (
        f"ACIP's stop ratio 0.05 cannot be reached: with no direction left, adapters of rank 2 alone keep {least:.3f} "
        "of the layers' elements; "
        "give a stop ratio above that, or a smaller adapter"
    )
    check_reachable(
        [source_shape(source) for source in case.sources], dataclasses.replace(SETTINGS, stop_ratio=least + 1e-9)
    )


def source_shape(source: Source) -> tuple[int, int]:
    return source.unit.rows, source.unit.cols


def test_a_target_that_the_steps_do_not_reach_is_an_error(case: Case, tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError,
        match=(
            r"^ACIP keeps 1\.000 of the layers' elements after 8 steps, expected 0\.4: give it more "
            r"steps, or a higher"
        ),
    ):
        run(case, tmp_path, dataclasses.replace(SETTINGS, steps=2, mask_rate=1e-9))


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("step_tokens", 1), ("tuning_steps", -1), ("adapter_rank", 0), ("stop_ratio", 1.0), ("basis", "x")],
)
def test_settings_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"^ACIP's .* is .*: expected "):
        dataclasses.replace(SETTINGS, **{name: value})


def test_fewer_steps_move_faster() -> None:
    settings = AcipSettings(steps=80)
    assert settings.speed == PUBLISHED_STEPS / 80
    assert AcipSettings().speed == 1


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    case = make_case()
    case.starts["model.layers.0.mlp.up_proj"].left[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"^ACIP diverged at step 0: the loss is nan"):
        run(case, tmp_path)


# From the order to options


def curvature_of(hessian: Tensor, gradient: Tensor) -> Curvature:
    noise = {block: torch.zeros(len(hessian)) for block in BLOCKS}
    return Curvature(pairs=((hessian, gradient),), rounding=hessian, noise=noise)


def outcome_of(case: Case, tmp_path: Path) -> Outcome:
    return run(case, tmp_path, dataclasses.replace(SETTINGS, tuning_steps=2))


def costs_of(case: Case) -> dict[str, Any]:
    return {name: start.costs.double().numpy() for name, start in case.starts.items()}


def test_the_merged_list_is_the_order_of_the_directions(case: Case, tmp_path: Path) -> None:
    outcome = outcome_of(case, tmp_path)
    rankings = rank_units(outcome, costs_of(case), SETTINGS)
    order = total_order(outcome.fates, Schedule.of(SETTINGS), SETTINGS.mask_rate * SETTINGS.speed)
    units, options, chains = [], [], {}
    for source in case.sources:
        unit, ranking = source.unit, rankings[source.unit.name]
        most = (unit.elements - 1) // (unit.rows + unit.cols)
        ranks = list(range(most, 1, -1))  # every one below break-even: each move drops one direction
        chain = [
            Option(
                form=LowRankForm(rank=rank, factors=FloatForm(label="f32")),
                bytes=4 * rank * (unit.rows + unit.cols),
                loss_nats=float(ranking.nats[rank - 2]),
            )
            for rank in ranks
        ]
        units.append(unit)
        options.append(chain)
        chains[unit.name] = ranks
    scoremap = make_map(units, options)
    place = {
        (order.names[unit], direction): position
        for position, (unit, direction) in enumerate(zip(order.units, order.directions, strict=True))
    }
    places = []
    for move in scoremap.moves:
        unit = scoremap.units[move.unit]
        form = scoremap.options[move.unit][move.option].form
        assert isinstance(form, LowRankForm)
        places.append(place[unit.name, int(rankings[unit.name].directions[form.rank - 2])])
    assert len(places) == sum(len(ranks) - 1 for ranks in chains.values()), "an option fell off its hull"
    assert places == sorted(places)


def test_the_adapter_is_taken_with_the_distance_pruned(case: Case, tmp_path: Path) -> None:
    outcome = outcome_of(case, tmp_path)
    for name, ranking in rank_units(outcome, costs_of(case), SETTINGS).items():
        fate = outcome.fates[name]
        assert ranking.strength[-1] == 0.0
        assert ranking.nats[-1] == 0.0
        assert bool((np.diff(ranking.strength) <= 0).all())
        assert bool((np.diff(ranking.nats) < 0).all())
        alive = int((fate.pruned == OPEN).sum())
        assert set(ranking.directions[:alive].tolist()) == set(np.flatnonzero(fate.pruned == OPEN).tolist())
        assert bool((ranking.strength[:alive] == 1.0).all())


def test_prices_at_the_stop_are_what_the_curvature_says(case: Case, tmp_path: Path) -> None:
    outcome, costs = outcome_of(case, tmp_path), costs_of(case)
    rankings = rank_units(outcome, costs, SETTINGS)
    charged = sum(float(rankings[name].nats[int((fate.pruned == OPEN).sum())]) for name, fate in outcome.fates.items())
    assert charged == pytest.approx(
        sum(float(costs[name][fate.pruned != OPEN].sum()) for name, fate in outcome.fates.items()), rel=1e-6
    )


@pytest.mark.parametrize("basis", ["curvature", "weights"])
def test_costs_of_a_start_are_prices(basis: str) -> None:
    weights, hessian, gradient = weights_of(12, 20), correlated(20, 1), correlated(12, 2)
    start = start_of(weights, curvature_of(hessian, gradient), basis)
    torch.testing.assert_close(start.left @ start.right * SCALE, weights, atol=1e-4, rtol=1e-4)
    if basis == "curvature":  # whose moments are damped
        hessian, gradient = (
            moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment)) for moment in (hessian, gradient)
        )
    for index in (0, 5, 11):
        dropped = start.left[:, index : index + 1] @ start.right[index : index + 1] * SCALE
        assert float(start.costs[index]) == pytest.approx(price(dropped, hessian, gradient), rel=2e-2, abs=1e-7)


@pytest.mark.parametrize(("kept", "rank", "strength"), [(0, 4, 1.0), (5, 3, 0.5), (9, 2, 0.0)])
def test_folding_gives_the_same_matrix_in_one_pair(kept: int, rank: int, strength: float) -> None:
    start = start_of(weights_of(16, 24), curvature_of(correlated(24, 1), correlated(16, 2)), "curvature")
    adapter = Adapter(up=weights_of(16, rank, 3), down=weights_of(rank, 24, 4))
    directions = np.random.default_rng(0).permutation(16)[:kept]
    pair = folded(start, directions, adapter, strength)
    assert (pair.left.shape, pair.right.shape) == ((16, kept + rank), (kept + rank, 24))
    expected = start.left[:, directions] @ start.right[directions] * SCALE + strength * adapter.up @ adapter.down
    torch.testing.assert_close(pair.left @ pair.right, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pair.left.norm(dim=0), pair.right.norm(dim=1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("low_bit", [True, False])
@pytest.mark.parametrize("shape", [(128, 96), (160, 160), (40, 24)])
def test_every_ranked_option_has_its_bytes_and_beats_the_matrix(low_bit: bool, shape: tuple[int, int]) -> None:
    unit = Unit(name="some", kind="linear", rows=shape[0], cols=shape[1], matrix="some")
    weights, curvature = weights_of(*shape), curvature_of(correlated(shape[1], 1), correlated(shape[0], 2))
    start, count = start_of(weights, curvature, "curvature"), min(shape)
    adapter = Adapter(up=0.01 * weights_of(shape[0], 2, 3), down=weights_of(2, shape[1], 4))
    mask = np.linspace(0.005, -0.02, count, dtype=np.float32)
    fate = acip.Fate(shape=shape, mask=mask, pruned=np.where(mask > 0, OPEN, 3).astype(np.int32), fell_to=mask)
    outcome = Outcome(fates={"some": fate}, adapters={"some": adapter}, pruning_steps=4)
    ranking = rank_units(outcome, {"some": start.costs.double().numpy()}, SETTINGS)["some"]
    kernels = Kernels(low_bit=low_bit)
    scored = list(ranked_options(unit, weights, curvature, start, ranking, quick=False, kernels=kernels))
    ranks = [item.option.form.rank for item in scored if isinstance(item.option.form, LowRankForm)]
    assert ranks == ranks_for(unit, 2, quick=False, low_bit=low_bit)
    assert ranks or low_bit
    losses = [item.option.loss_nats for item in scored if isinstance(item.option.form, LowRankForm)]
    assert losses == sorted(losses)
    for item in scored:
        option = item.option
        assert option.bytes == sum(spec.bytes for spec in option.form.tensors(*shape).values())
        found = torch.from_numpy(option.form.dequantize(item.tensors, *shape))
        if isinstance(option.form, FloatForm):
            assert torch.equal(found, weights)
            assert option.loss_nats == 0.0
        if isinstance(option.form, LowRankForm):
            assert option.form.rank * sum(shape) < unit.elements
            assert option.loss_nats > 0
            if not low_bit:
                kept = ranking.directions[: option.form.rank - 2]
                strength = float(ranking.strength[option.form.rank - 2])
                expected = start.left[:, kept] @ start.right[kept] * SCALE + strength * adapter.up @ adapter.down
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_options_are_of_the_devices_kernels(case: Case, tmp_path: Path) -> None:
    outcome = outcome_of(case, tmp_path)
    rankings = rank_units(outcome, costs_of(case), SETTINGS)
    source = case.sources[0]
    curvature = curvature_of(correlated(64, 1), correlated(64, 2))
    name, weights = source.unit.name, source.weight(case.model)

    def labels(kernels: Kernels) -> set[str]:
        made = ranked_options(
            source.unit, weights, curvature, case.starts[name], rankings[name], quick=True, kernels=kernels
        )
        return {item.option.form.label for item in made}

    assert all(label.endswith("f16") for label in labels(Kernels(floats="f16", low_bit=False)))
    assert {"f32", "q8g64", "q4g64z"} <= labels(Kernels())
