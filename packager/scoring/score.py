"""The one computation per model, phase by phase: checkpoint and calibration text in, a `.map` folder out.

Finished work lies in a folder beside the target until the map is whole, and a killed run resumes from there: see
`packager.scoring.workspace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import psutil
import torch

from packager import __version__
from packager.graph.kv_cache_codes import cache_facts
from packager.graph.skeleton import export_skeleton
from packager.io.outputs import published_folder, reserved
from packager.progress import Progress
from packager.runtime.device_check import peak_bytes
from packager.scoremap.folder import MAP, MapFolder
from packager.scoremap.identity import MapIdentity, read_identity, require_model
from packager.scoremap.model import SCHEMA
from packager.scoremap.settings import ScoreSettings
from packager.scoring.acip.method import AcipMethod
from packager.scoring.bench import Bench, Skeleton, Stopwatch, Subject, first_half
from packager.scoring.correction import Measured, correct_and_anchor
from packager.scoring.curvature.method import CurvatureMethod, group_curvature
from packager.scoring.curvature.moments import Curvature, groups
from packager.scoring.graph_check import check_graph
from packager.scoring.kv_cache_price import KvCachePrice, price_kv_cache
from packager.scoring.method import MakeOptions, ScoringMethod, labels_tried, rounded_blocks
from packager.scoring.workspace import WorkKey, Workspace
from packager.scoring.write_map import MapContent, write_map
from packager.source.calibration_text import CalibrationText, load_calibration, nats_per_byte, unfamiliar
from packager.source.checkpoint import Checkpoint, vectors
from packager.source.stop_tokens import with_stop_tokens
from packager.source.unit_weights import Source, find_sources

_KV_CACHE_WINDOWS = 16


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


def method_of(settings: ScoreSettings) -> ScoringMethod:
    """The method that the settings ask for."""
    if settings.acip:
        return AcipMethod(settings=settings, acip=settings.acip)
    return CurvatureMethod(settings=settings)


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

    Raises CalibrationError for a text that cannot be used, ModelError for a model that cannot, UsageError for settings
    that this model cannot meet, OutputError where another process scores into `out` or nothing can be written. A text
    that the model does not know is a warning.
    """
    method = method_of(settings)
    with reserved(out, MAP, force=force, inputs=[*checkpoint.inputs, *calibration_paths]):
        bench = _set_up(_read(checkpoint, calibration_paths, settings, device, progress), method, out)
        _make_options(bench, method.prepare(bench))
        measured = correct_and_anchor(bench, method.bands)
        familiarity = _familiarity(bench, measured)
        content = MapContent(bench=bench, measured=measured, kv_cache=_price_kv_cache(bench))
        identity = _publish(content, out, force=force)
        return ScoreReport(
            identity=identity,
            nats_per_byte=familiarity.nats_per_byte,
            seconds=bench.stopwatch.seconds(),
            peak_bytes=peak_bytes(),
            warnings=familiarity.warnings,
        )


def map_differences(
    folder: Path, checkpoint: Checkpoint, settings: ScoreSettings, calibration_paths: Sequence[Path]
) -> list[str]:
    """In what the map in `folder` is not of these settings and this text; nothing where it need not be made again.

    ArtifactError when it is of another model.
    """
    identity = read_identity(folder)
    require_model(folder, identity, checkpoint.name, checkpoint.sha256())
    text = load_calibration(calibration_paths, checkpoint.tokenizer(), tokens=settings.tokens, seed=settings.seed)
    found = identity.settings.differences(settings)
    # Other tokens or another seed choose other windows: a hash of its own says nothing more then.
    if identity.calibration.text != text.description or (not found and identity.calibration.sha256 != text.sha256):
        found.append(f"another calibration text, {identity.calibration.text}")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """Phase 1: what was asked for, with the model and the text in memory."""

    subject: Subject
    text: CalibrationText
    settings: ScoreSettings
    progress: Progress
    stopwatch: Stopwatch


def _read(
    checkpoint: Checkpoint,
    calibration_paths: Sequence[Path],
    settings: ScoreSettings,
    device: str,
    progress: Progress,
) -> _Read:
    stopwatch = Stopwatch()
    progress.phase("reading the model", 1)
    config, tokenizer = checkpoint.config(), checkpoint.tokenizer()
    # Cheap, and before what is not: a tokenizer or a graph that is wrong would be worth no score.
    config = with_stop_tokens(config, checkpoint.stop_tokens(config, tokenizer))
    runtime_tokenizer = checkpoint.runtime_tokenizer(config, tokenizer)
    checked = check_graph(config) if settings.provider == "cpu" else None
    text = load_calibration(calibration_paths, tokenizer, tokens=settings.tokens, seed=settings.seed)
    model = checkpoint.load(_dtype(checkpoint)).to(device)
    subject = Subject(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        runtime_tokenizer=runtime_tokenizer,
        model=model,
        sha256=checkpoint.sha256(),
        whole_prompt_tokens=checked.whole_prompt if checked else 0,
    )
    progress.advance()
    stopwatch.lap("read")
    return _Read(subject=subject, text=text, settings=settings, progress=progress, stopwatch=stopwatch)


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """float32 where the model fits in half the memory that is free, else bfloat16. Sums are float32 either way."""
    stored = sum(path.stat().st_size for path in checkpoint.files)
    return torch.float32 if 2 * stored < psutil.virtual_memory().available // 2 else torch.bfloat16


def _set_up(read: _Read, method: ScoringMethod, out: Path) -> Bench:
    """Phase 2: the work folder of the map `out`, the graph, and its units, checked against the settings."""
    work = Workspace.open(out, _work_key(read, method))
    skeleton = _export(read.subject, read.settings, work)
    units = [source.unit for source in skeleton.sources]
    method.check(units)
    read.stopwatch.lap("skeleton")
    return Bench(
        subject=read.subject,
        text=read.text,
        skeleton=skeleton,
        blocks=rounded_blocks(method, units, read.settings.kernels),
        settings=read.settings,
        work=work,
        progress=read.progress,
        stopwatch=read.stopwatch,
    )


def _work_key(read: _Read, method: ScoringMethod) -> WorkKey:
    """What finished work depends on: another model, text, setting, version or set of forms starts anew."""
    return WorkKey(
        model=read.subject.sha256,
        calibration=read.text.sha256,
        settings=read.settings,
        schema=SCHEMA,
        versions={"packager": __version__, "torch": torch.__version__},
        forms=labels_tried(method),
    )


def _export(subject: Subject, settings: ScoreSettings, work: Workspace) -> Skeleton:
    unfinished = MapFolder(root=work.folder)
    folder = unfinished.skeleton_folder(settings.provider)
    matrices, nodes = export_skeleton(subject.config, dict(vectors(subject.model)), settings.provider, folder)
    return Skeleton(
        graph=unfinished.skeleton(settings.provider).graph, nodes=nodes, sources=find_sources(matrices, subject.model)
    )


def _make_options(bench: Bench, make: MakeOptions) -> None:
    """Phase 3: the options of every unit into the work folder, a group of units at a time."""
    for number, group in enumerate(groups(bench.sources)):
        if all(bench.work.has_options(source.unit) for source in group):
            continue
        curvature = group_curvature(bench, number, group)
        bench.stopwatch.lap("curvature")
        bench.progress.phase("rounding and pricing options", len(group))
        for source in group:
            if not bench.work.has_options(source.unit):
                # Let go of one by one: it is the largest thing in memory.
                _make_unit_options(bench, make, source, curvature.pop(source.unit.name))
            bench.progress.advance()
        bench.work.drop_curvature(number)
        del curvature  # what a resumed run had no use for
        bench.stopwatch.lap("options")


@torch.no_grad()
def _make_unit_options(bench: Bench, make: MakeOptions, source: Source, curvature: Curvature) -> None:
    bench.work.save_options(source.unit, make(source.unit, source.weight(bench.model), curvature))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Familiarity:
    """How well the model knows the held-out text, and what the user should know of that."""

    nats_per_byte: float
    warnings: tuple[str, ...]


def _familiarity(bench: Bench, measured: Measured) -> _Familiarity:
    per_byte = nats_per_byte(measured.token_nats.cpu(), bench.heldout, bench.subject.tokenizer)
    warning = unfamiliar(bench.text.description, measured.heldout_nats, per_byte)
    if warning:
        bench.progress.warn(warning)
    return _Familiarity(nats_per_byte=per_byte, warnings=(warning,) if warning else ())


def _price_kv_cache(bench: Bench) -> KvCachePrice:
    """Phase 5, after probes and anchors: what an 8-bit key/value cache costs."""
    bench.progress.phase("measuring an 8-bit cache", 1)
    facts = cache_facts(ir.load(bench.skeleton.graph).graph, bench.settings.provider)
    windows, heldout = bench.text.windows[:_KV_CACHE_WINDOWS], first_half(bench.heldout)
    price = price_kv_cache(bench.model, facts, windows, heldout, bench.work.ledger)
    bench.progress.advance()
    bench.stopwatch.lap("cache")
    return price


def _publish(content: MapContent, out: Path, *, force: bool) -> MapIdentity:
    """Phase 6: the map under its name; the work folder goes."""
    bench = content.bench
    bench.progress.phase("writing the map", 1)
    with published_folder(out, MAP, force=force) as staging:
        identity = write_map(staging, content)
    bench.work.remove()
    bench.progress.advance()
    bench.stopwatch.lap("write")
    return identity
