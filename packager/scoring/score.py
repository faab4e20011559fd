"""The one computation per model: checkpoint and calibration text in, a `.map` folder out.

Finished work lies in a folder beside the target until the map is whole, and a killed run resumes from there: see
`packager.scoring.workspace`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil
import torch
from safetensors.numpy import save_file

from packager import __version__
from packager.errors import CalibrationError
from packager.graph.kv_cache_codes import CACHE_ROLES, cache_facts, scale_name
from packager.graph.skeleton import GRAPH_FILE, export_skeleton
from packager.io.files import (
    dump_json,
    read_json,
    sha256_file,
    sha256_json,
    write_text,
)
from packager.io.outputs import published_folder, reserved
from packager.memory.geometry import read_geometry
from packager.planning.solver import choice_at, total_loss
from packager.progress import Progress
from packager.runtime.device_check import peak_bytes
from packager.scoremap.anchors import Anchor, monotone
from packager.scoremap.identity import (
    MAP,
    CalibrationIdentity,
    Losses,
    MapIdentity,
    ModelIdentity,
    Probe,
    read_identity,
    require_model,
)
from packager.scoremap.model import IDENTITY_FILE, MAP_FILE, SCHEMA, Option, ScoreMap, make_map, map_tensors
from packager.scoring.acip.options import Ranking, labels_ranked, learn, load_start, prepare, ranked_options, start_path
from packager.scoring.acip.training import AcipSettings, check_reachable
from packager.scoring.curvature.moments import Curvature, collect, groups
from packager.scoring.curvature.options import Kernels, forms_tried, score_unit
from packager.scoring.kv_cache_price import score_cache
from packager.scoring.ledger import Ledger
from packager.scoring.probes import Observer, anchor_prefixes, corrected, multipliers, perturbed, probe_sets
from packager.scoring.workspace import (
    LEDGER_FILE,
    curvature_path,
    load_curvature,
    load_options,
    load_weights,
    open_work,
    options_path,
    save_curvature,
    save_options,
    write_store,
)
from packager.source.calibration_text import Calibration, load_calibration, nats_per_byte, unfamiliar
from packager.source.checkpoint import Checkpoint, vectors
from packager.source.unit_weights import Source, find_sources

REFERENCE_FILE = "reference.safetensors"
SKELETON_FOLDER = "skeleton"
SIDE_FOLDER = "model"
QUICK_TOKENS = 4096
QUICK_ANCHOR_NATS = (0.01, 0.05, 0.2, 0.8)
ANCHOR_NATS = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6)
_NOISY_NATS = 0.05
_CACHE_WINDOWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSettings:
    """What a map's content depends on besides the model and the text. `tokens` of calibration, a `seed`.

    `float_only` is for devices without low-bit kernels. `acip` scores by that method; without, by curvature.
    """

    tokens: int = 32768
    seed: int = 0
    quick: bool = False
    provider: str = "cpu"
    sampled_labels: bool = False
    float_only: bool = False
    acip: AcipSettings | None = None

    @property
    def kernels(self) -> Kernels:
        """What the options may be made of. Graphs for accelerators hold float16, and only CPUs' kernels round
        inputs."""
        cpu = self.provider == "cpu"
        return Kernels(floats="f32" if cpu else "f16", low_bit=not self.float_only, rounds_inputs=cpu)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreReport:
    """What making a map came to: its identity (`map.json`), what this run took, and what the user should know.

    `seconds` per phase; `peak_bytes` of memory, None where the system does not say. Phases that an earlier, killed run
    had finished take next to none. `nats_per_byte` is the source model's loss on the held-out text.
    """

    identity: MapIdentity
    nats_per_byte: float
    seconds: dict[str, float]
    peak_bytes: int | None
    warnings: tuple[str, ...]


def score_model(
    checkpoint: Checkpoint,
    out: Path,
    settings: ScoreSettings,
    *,
    calibration_paths: Sequence[Path] = (),
    device: str = "cpu",
    force: bool = False,
    progress: Progress,
) -> ScoreReport:
    """Write the score map of `checkpoint` to folder `out`.

    Raises CalibrationError for a text that cannot be used, ModelError for a model that cannot, OutputError where
    another process scores into `out` or nothing can be written. A text that the model does not know is a warning.
    """
    with reserved(out, MAP, force=force, inputs=[*checkpoint.inputs, *calibration_paths]):
        return _scored(checkpoint, out, settings, calibration_paths, device, force, progress)


def _scored(
    checkpoint: Checkpoint,
    out: Path,
    settings: ScoreSettings,
    calibration_paths: Sequence[Path],
    device: str,
    force: bool,
    progress: Progress,
) -> ScoreReport:
    """`score_model`, while its output and work folder are held for it."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(phase: str) -> None:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started - sum(seconds.values())

    progress.phase("reading the model", 1)
    config, tokenizer = checkpoint.config(), checkpoint.tokenizer()
    calibration = load_calibration(calibration_paths, tokenizer, tokens=settings.tokens, seed=settings.seed)
    model = checkpoint.load(_dtype(checkpoint)).to(device)
    model_hash = checkpoint.sha256()
    work = open_work(out, _work_key(model_hash, calibration, settings))
    progress.advance()
    lap("read")
    matrices, nodes = export_skeleton(
        config, dict(vectors(model)), settings.provider, work / SKELETON_FOLDER / settings.provider
    )
    sources = find_sources(matrices, model)
    if settings.acip:
        check_reachable(
            [(source.unit.rows, source.unit.cols) for source in sources if source.unit.kind == "linear"], settings.acip
        )
    lap("skeleton")
    rankings = _rankings(model, sources, calibration, settings, work, progress) if settings.acip else {}
    if settings.acip:
        lap("acip")
    for number, group in enumerate(groups(sources)):
        if all(options_path(work, source.unit).exists() for source in group):
            continue
        curvature = _curvature(model, group, calibration, settings, curvature_path(work, number), progress)
        lap("curvature")
        progress.phase("rounding and pricing options", len(group))
        for source in group:
            if not options_path(work, source.unit).exists():
                # Let go of one by one: it is the largest thing in memory.
                _score(work, source, model, curvature.pop(source.unit.name), settings, rankings.get(source.unit.name))
            progress.advance()
        curvature_path(work, number).unlink(missing_ok=True)
        del curvature  # what a resumed run had no use for
        lap("options")
    heldout = _half(calibration.heldout) if settings.quick else calibration.heldout
    scoremap, measured = _measure(work, sources, model, heldout, settings, progress)
    lap("probes")
    per_byte = nats_per_byte(measured.token_nats.cpu(), heldout, tokenizer)
    warning = unfamiliar(calibration.description, float(measured.token_nats.double().mean()), per_byte)
    if warning:
        progress.warn(warning)
    progress.phase("measuring an 8-bit cache", 1)
    facts = cache_facts(ir.load(work / SKELETON_FOLDER / settings.provider / GRAPH_FILE).graph, settings.provider)
    int8_cache, steps = score_cache(
        model, facts, calibration.windows[:_CACHE_WINDOWS], _half(heldout), Ledger(work / LEDGER_FILE)
    )
    progress.advance()
    lap("cache")
    progress.phase("writing the map", 1)
    with published_folder(out, MAP, force=force) as staging:
        write_store(work, scoremap, staging)
        arrays, metadata = map_tensors(scoremap)
        save_file(arrays, staging / MAP_FILE, metadata=metadata)
        shutil.copytree(work / SKELETON_FOLDER, staging / SKELETON_FOLDER)
        checkpoint.save_side_files(staging / SIDE_FOLDER, config, tokenizer)
        reference = {f"vector.{name}": tensor.numpy() for name, tensor in vectors(model)}
        reference |= {
            "heldout": heldout.numpy().astype("int32"),
            "heldout_nats": measured.token_nats.float().cpu().numpy(),
        }
        reference |= {
            scale_name(layer, role): step.numpy()
            for layer, pair in steps.items()
            for role, step in zip(CACHE_ROLES, pair, strict=True)
        }
        save_file(reference, staging / REFERENCE_FILE)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        genai = read_json(staging / SKELETON_FOLDER / settings.provider / "genai_config.json")
        geometry = read_geometry(config, nodes=nodes, tokenizer=staging / SIDE_FOLDER / "tokenizer.json", genai=genai)
        model_identity = ModelIdentity(
            name=checkpoint.name,
            source=checkpoint.source if not Path(checkpoint.source).is_absolute() else Path(checkpoint.source).name,
            sha256=model_hash,
            architecture=(config.architectures or ["?"])[0],
            parameters=parameters,
            float16_bytes=2 * parameters,
            max_context_tokens=int(config.max_position_embeddings),
        )
        text = CalibrationIdentity(
            text=calibration.description, sha256=calibration.sha256, tokens=calibration.windows.numel()
        )
        identity = MapIdentity(
            schema=SCHEMA,
            model=model_identity,
            geometry=geometry,
            calibration=text,
            losses=Losses(heldout_nats=float(measured.token_nats.double().mean())),
            probes=measured.probes,
            anchors=measured.anchors,
            settings=asdict(settings),
            versions={name: version(name) for name in ("torch", "transformers", "onnxruntime-genai", "edge-packager")},
            files={
                path.relative_to(staging).as_posix(): sha256_file(path)
                for path in sorted(staging.rglob("*"))
                if path.is_file()
            },
            int8_cache=int8_cache,
        )
        write_text(staging / IDENTITY_FILE, dump_json(identity.to_dict()))
    shutil.rmtree(work, ignore_errors=True)
    progress.advance()
    lap("write")
    taken = {phase: round(time_taken, 3) for phase, time_taken in seconds.items()}
    return ScoreReport(
        identity=identity,
        nats_per_byte=per_byte,
        seconds=taken,
        peak_bytes=peak_bytes(),
        warnings=(warning,) if warning else (),
    )


def _half(windows: torch.Tensor) -> torch.Tensor:
    """The first half of them, at least one: divergences, far less noisy than rises of the loss, need no more."""
    return windows[: -(-len(windows) // 2)]


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """float32 where the model fits in half the memory that is free, else bfloat16. Sums are float32 either way."""
    stored = sum(path.stat().st_size for path in checkpoint.files)
    return torch.float32 if 2 * stored < psutil.virtual_memory().available // 2 else torch.bfloat16


def map_differences(
    folder: Path, checkpoint: Checkpoint, settings: ScoreSettings, calibration_paths: Sequence[Path]
) -> list[str]:
    """In what the map in `folder` is not of these settings and this text; nothing where it need not be made again.

    ArtifactError when it is of another model.
    """
    identity = read_identity(folder)
    require_model(folder, identity, checkpoint.name, checkpoint.sha256())
    calibration = load_calibration(
        calibration_paths, checkpoint.tokenizer(), tokens=settings.tokens, seed=settings.seed
    )
    wanted = asdict(settings)
    names = sorted(wanted.keys() | identity.settings.keys())
    found = [
        f"{name} {identity.settings.get(name)!r} in place of {wanted.get(name)!r}"
        for name in names
        if identity.settings.get(name) != wanted.get(name)
    ]
    # Other tokens or another seed choose other windows: a hash of its own says nothing more then.
    if identity.calibration.text != calibration.description or (
        not found and identity.calibration.sha256 != calibration.sha256
    ):
        found.append(f"another calibration text, {identity.calibration.text}")
    return found


def _work_key(model_hash: str, calibration: Calibration, settings: ScoreSettings) -> dict[str, Any]:
    """What finished work depends on: another model, text, setting, version or set of forms starts anew."""
    forms = forms_tried(quick=settings.quick, kernels=settings.kernels)
    if settings.acip:
        forms += labels_ranked(settings.acip.adapter_rank, quick=settings.quick, kernels=settings.kernels)
    return {
        "model": model_hash,
        "calibration": calibration.sha256,
        "settings": asdict(settings),
        "schema": SCHEMA,
        "versions": {"packager": __version__, "torch": torch.__version__},
        "forms": forms,
    }


def _curvature(
    model: torch.nn.Module,
    group: Sequence[Source],
    calibration: Calibration,
    settings: ScoreSettings,
    cache: Path,
    progress: Progress,
) -> dict[str, Curvature]:
    if cache.is_file():
        return load_curvature(cache, [source.unit.name for source in group], next(model.parameters()).device)
    progress.phase(f"measuring curvature on {calibration.description}", len(calibration.windows))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        progress.advance(count - done)
        done = count

    curvature = collect(
        model,
        group,
        calibration.windows,
        seed=settings.seed,
        batch=1,
        sampled=settings.sampled_labels,
        progress=advance,
    )
    for name, item in curvature.items():
        if not all(bool(torch.isfinite(matrix).all()) for pair in item.pairs for matrix in pair):
            raise CalibrationError(
                f"{name}: its activations on the calibration text are not finite: the model overflows in float32 or "
                f"the checkpoint is damaged"
            )
    save_curvature(cache, curvature)
    return curvature


def _rankings(
    model: torch.nn.Module,
    sources: Sequence[Source],
    calibration: Calibration,
    settings: ScoreSettings,
    work: Path,
    progress: Progress,
) -> dict[str, Ranking]:
    """ACIP's ranking of every linear unit. Curvature comes first: it gives the directions that are trained."""
    assert settings.acip is not None
    linear = [source for source in sources if source.unit.kind == "linear"]
    if all(options_path(work, source.unit).exists() for source in linear):
        return {}
    for number, group in enumerate(groups(sources)):
        missing = [
            source for source in group if source.unit.kind == "linear" and not start_path(work, source.unit).exists()
        ]
        if missing:
            curvature = _curvature(model, group, calibration, settings, curvature_path(work, number), progress)
            progress.phase("taking layers apart", len(missing))
            for source in missing:
                prepare(work, source, model, curvature[source.unit.name], settings.acip)
                progress.advance()
    adapt_whole = not settings.float_only
    return learn(
        work,
        model,
        linear,
        calibration.windows,
        settings.acip,
        seed=settings.seed,
        adapt_whole=adapt_whole,
        progress=progress,
    )


@torch.no_grad()
def _score(
    work: Path,
    source: Source,
    model: torch.nn.Module,
    curvature: Curvature,
    settings: ScoreSettings,
    ranking: Ranking | None,
) -> None:
    """The options of one unit, made by the method that was asked for, into its file."""
    unit, weights = source.unit, source.weight(model)
    if ranking is None:
        made = score_unit(unit, weights, curvature, quick=settings.quick, kernels=settings.kernels)
    else:
        start = load_start(work, unit, weights.device)
        made = ranked_options(unit, weights, curvature, start, ranking, quick=settings.quick, kernels=settings.kernels)
    save_options(work, unit, made)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """What the model itself said: the loss of each held-out token, the probes of each class, anchors along the map."""

    token_nats: torch.Tensor
    probes: tuple[Probe, ...]
    anchors: tuple[Anchor, ...]


@torch.no_grad()
def _measure(
    work: Path,
    sources: Sequence[Source],
    model: torch.nn.Module,
    heldout: torch.Tensor,
    settings: ScoreSettings,
    progress: Progress,
) -> tuple[ScoreMap, _Measured]:
    """The map with its prices corrected by probes, and the curve through its anchors.

    ACIP's prices take one factor for the whole depth: several would change its order.
    """
    units = [source.unit for source in sources]
    options = [load_options(work, unit) for unit in units]
    ledger = Ledger(work / LEDGER_FILE)

    def load(source: Source, option: Option) -> torch.Tensor:
        return load_weights(work, source.unit, option)

    def ask(observer: Observer, windows: int, chosen: dict[str, Option]) -> tuple[float, float]:
        """Divergence and rise with the chosen options, from the ledger where they were measured before."""

        def measure() -> tuple[float, float]:
            with perturbed(model, sources, chosen, load, rounds_inputs=settings.kernels.rounds_inputs):
                return observer.measure()

        return ledger.recall(
            sha256_json({"windows": windows, "forms": {name: option.form.label for name, option in chosen.items()}}),
            measure,
        )

    bands, levels = 1 if settings.quick or settings.acip else 3, QUICK_ANCHOR_NATS if settings.quick else ANCHOR_NATS
    sets = probe_sets(units, options, bands)
    progress.phase("probing what perturbations cost", len(sets) + len(levels) + 2)
    observer, glance = Observer(model, heldout), Observer(model, _half(heldout))
    if not bool(torch.isfinite(observer.token_nats).all()):
        raise CalibrationError(
            "the model's loss on the held-out text is not finite: the model overflows or the checkpoint is damaged"
        )
    progress.advance()
    probes = []
    for kind, chosen in sets.items():
        divergence, _ = ask(glance, len(_half(heldout)), chosen)
        probes.append(
            Probe(
                kind=kind, predicted_nats=sum(option.loss_nats for option in chosen.values()), measured_nats=divergence
            )
        )
        progress.advance()
    scoremap = make_map(units, corrected(units, options, multipliers(probes), bands))
    anchors = []
    for prefix in anchor_prefixes(scoremap, levels):
        choice = choice_at(scoremap, prefix)
        taken = {unit.name: chain[index] for unit, chain, index in zip(units, scoremap.options, choice, strict=True)}
        divergence, rise = ask(observer, len(heldout), taken)
        # Small rises drown in the noise of the text; there the divergence, which has none, stands for them.
        measured = rise if rise > _NOISY_NATS else divergence
        anchors.append(Anchor(priced_nats=total_loss(scoremap, choice), measured_nats=measured))
        progress.advance()
    return scoremap, _Measured(token_nats=observer.token_nats, probes=tuple(probes), anchors=monotone(anchors))
