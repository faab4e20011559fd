"""The whole way: score if needed, plan, build, validate, tighten, repeat.

When the measured peak exceeds the budget, or leaves much of a binding budget unused, the difference is given to the
solver and the bundle is built again: cheap, for a build is a copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.bundle.manifest import Manifest
from packager.bundle.writer import BUNDLE, GOLDEN_FILE, write_contents, write_manifest
from packager.errors import ArtifactError, InfeasibleBudgetError
from packager.io.leftovers import scratch_folder
from packager.io.outputs import published_folder, refuse_existing, reserved
from packager.planning.plan import LoadedMap, Plan, Request, load_map
from packager.profile import DeviceProfile
from packager.progress import Progress
from packager.scoremap.model import IDENTITY_FILE
from packager.validation.report import ValidationReport, write_report

if TYPE_CHECKING:
    from packager.scoring.polish_plan import Polishing
    from packager.scoring.score import ScoreSettings

_ROUNDS = 3
_MARGIN_SHARE = 0.01
"""Of the budget, for what a limit counts beside the process's own pages; a process at its very limit crawls."""
_UNUSED_SHARE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What a build came to. `report` is None when validation was skipped."""

    plan: Plan
    manifest: Manifest
    report: ValidationReport | None


def build(
    loaded: LoadedMap,
    request: Request,
    out: Path,
    *,
    validate: bool,
    force: bool,
    progress: Progress,
    polishing: Polishing | None = None,
) -> Built:
    """Write the bundle for `request` to folder `out`, validated on the runtime unless told otherwise, its block scales
    tuned against the original model where `polishing` is given.

    A bundle whose checks fail is published too, with a report that says so: it is for the caller to refuse it.
    """
    inputs = [loaded.folder, *([*polishing.calibration_paths, *polishing.checkpoint.inputs] if polishing else [])]
    with published_folder(out, BUNDLE, force=force, inputs=inputs) as staging:
        plan = request.plan(loaded)
        if validate:
            return _validated(loaded, request, plan, staging, progress, polishing)
        _stage(loaded, plan, request.profile, staging, progress)
        polish = _polished(loaded, plan, request.profile, staging, progress, polishing)
        manifest = write_manifest(staging, loaded, plan, request.profile.provider, measured=None, polish=polish)
        return Built(plan=plan, manifest=manifest, report=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """One build of the closed loop: its plan, what it kept free beside the prediction, and the peak it measured."""

    plan: Plan
    reserve_bytes: int
    peak_bytes: int

    @property
    def room_bytes(self) -> int:
        """What of the budget is left, negative where the peak exceeds it."""
        return self.plan.budget_bytes - self.peak_bytes

    @property
    def margin_bytes(self) -> int:
        """What ought to be left."""
        return int(_MARGIN_SHARE * self.plan.budget_bytes)

    @property
    def slack(self) -> bool:
        """Whether it leaves much of the budget unused, and gave something up."""
        return self.plan.prefix > 0 and self.room_bytes > _UNUSED_SHARE * self.plan.budget_bytes

    @property
    def tight(self) -> bool:
        """Whether it exceeds the budget or, having something left to give up, comes too near to it."""
        return self.room_bytes < (self.margin_bytes if self.plan.prefix > 0 else 0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "context_tokens": self.plan.context_tokens,
            "cache": self.plan.cache,
            "file_bytes": self.plan.file_bytes,
            "loss_nats": self.plan.loss_nats,
            "predicted_bytes": self.plan.peak_bytes,
            "measured_bytes": self.peak_bytes,
            "reserve_bytes": self.reserve_bytes,
        }


def _validated(
    loaded: LoadedMap, request: Request, plan: Plan, staging: Path, progress: Progress, polishing: Polishing | None
) -> Built:
    from packager.runtime.providers import require_supported
    from packager.validation import reference
    from packager.validation.validate import validate_bundle

    provider = request.profile.provider
    require_supported(provider)
    rounds = _closed_loop(loaded, request, plan, staging, progress)
    chosen = _best(rounds)
    if chosen is not rounds[-1]:
        _stage(loaded, chosen.plan, request.profile, staging, progress)
    plan = chosen.plan
    polish = _polished(loaded, plan, request.profile, staging, progress, polishing)
    progress.phase("golden outputs in torch", 1)
    torch_side = reference.load_reference(staging, write_manifest(staging, loaded, plan, provider, measured=None))
    reference.write_golden(torch_side, staging / GOLDEN_FILE, context_tokens=plan.context_tokens)
    progress.advance()
    manifest = write_manifest(staging, loaded, plan, provider, measured=None, polish=polish)
    report = validate_bundle(
        staging, manifest, progress=progress, rounds=[item.to_dict() for item in rounds], torch_side=torch_side
    )
    manifest = write_manifest(staging, loaded, plan, provider, measured=report.measured, polish=polish)
    write_report(report, staging)
    return Built(plan=plan, manifest=manifest, report=report)


def _closed_loop(loaded: LoadedMap, request: Request, plan: Plan, staging: Path, progress: Progress) -> list[_Round]:
    """Build and measure until the peak fits and the budget is used, three times at most; the last round lies staged."""
    from packager.validation.validate import measure_device

    rounds: list[_Round] = []
    reserve: int | None = 0
    # What was measured of one cache says nothing of the other: later rounds keep the first one's.
    kept = replace(request, cache=plan.cache)
    while reserve is not None and len(rounds) < _ROUNDS:
        if rounds:
            again = _planned_again(loaded, kept, rounds[-1], reserve)
            if again is None or (again.choices, again.context_tokens) == (
                rounds[-1].plan.choices,
                rounds[-1].plan.context_tokens,
            ):
                break
            plan = replace(again, cache_note=plan.cache_note)
        _stage(loaded, plan, request.profile, staging, progress)
        progress.phase(f"measuring its memory (round {len(rounds) + 1})", 1)
        document, _ = measure_device(staging, None)
        progress.advance()
        # A run that failed has no peak: validation will say why.
        peak = int(document["memory"].get("peak_bytes", 0)) if document else 0
        rounds.append(_Round(plan=plan, reserve_bytes=reserve, peak_bytes=peak))
        reserve = _next_reserve(rounds[-1]) if peak else None
    return rounds


def _planned_again(loaded: LoadedMap, request: Request, last: _Round, reserve: int) -> Plan | None:
    """The plan that keeps `reserve` free, or at least what was measured beside the prediction; None where the last one,
    which fits, is the smallest. InfeasibleBudgetError where it did not fit."""
    for spare in (reserve, reserve - last.margin_bytes):
        try:
            return request.plan(loaded, spare)
        except InfeasibleBudgetError as error:
            refused = error
    if last.room_bytes < 0:
        raise refused
    return None


def _next_reserve(last: _Round) -> int | None:
    """What to keep free beside the prediction in the next round, or None when this one will do."""
    return last.peak_bytes - last.plan.peak_bytes + last.margin_bytes if last.tight or last.slack else None


def _best(rounds: Sequence[_Round]) -> _Round:
    """The round to publish. Of those that fit, the one of the most weights that is neither tight nor slack; else the
    tight one that has the most room, for its peak is measured once more; else the largest slack one. The last where
    none fits.
    """

    def rank(item: _Round) -> tuple[int, int]:
        if item.tight:
            return 1, item.room_bytes
        return 0 if item.slack else 2, item.plan.file_bytes

    fitting = [item for item in rounds if item.peak_bytes and item.room_bytes >= 0]
    return max(fitting, key=rank, default=rounds[-1])


def _polished(
    loaded: LoadedMap,
    plan: Plan,
    profile: DeviceProfile,
    staging: Path,
    progress: Progress,
    polishing: Polishing | None,
) -> dict[str, Any] | None:
    """Stage the plan again with tuned scales, which changes neither its bytes nor its memory; what there is to say of
    it."""
    if polishing is None:
        return None
    from packager.scoring.polish_plan import polish_plan

    with scratch_folder() as scratch:
        tuned = scratch / "polished.safetensors"
        said = polish_plan(loaded, plan, polishing, tuned, progress)
        _stage(loaded, plan, profile, staging, progress, tuned)
    return said


def _stage(
    loaded: LoadedMap,
    plan: Plan,
    profile: DeviceProfile,
    staging: Path,
    progress: Progress,
    polished: Path | None = None,
) -> None:
    progress.phase("writing the bundle", 1)
    for path in staging.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_contents(loaded, plan, profile, staging, polished)
    write_manifest(staging, loaded, plan, profile.provider, measured=None)
    progress.advance()


def pack(
    source: str,
    request: Request,
    out: Path,
    *,
    calibration_paths: Sequence[Path],
    settings: ScoreSettings,
    device: str,
    validate: bool,
    force: bool,
    progress: Progress,
    cache: Path | None = None,
) -> Built:
    """From a model to a bundle: score it unless the map lies beside the bundle already, then build.

    ArtifactError where the map there is of other settings, for it may have taken hours; `force` replaces it.
    """
    from packager.scoring.score import map_differences, score_model
    from packager.source.checkpoint import open_checkpoint

    refuse_existing(out, BUNDLE, force=force)
    checkpoint = open_checkpoint(source)
    folder = cache or out.parent / f"{checkpoint.name}.map"
    with reserved(out, BUNDLE, force=force, inputs=[folder, *checkpoint.inputs, *calibration_paths]):
        differences = (
            map_differences(folder, checkpoint, settings, calibration_paths)
            if (folder / IDENTITY_FILE).is_file()
            else None
        )
        if differences and not force:
            raise ArtifactError(
                f"{folder} is the map of this model with other settings ({'; '.join(differences)}): keep it and name "
                f"another with --map, "
                "or pass --force to score again in its place"
            )
        if differences != []:
            score_model(
                checkpoint,
                folder,
                settings,
                calibration_paths=calibration_paths,
                device=device,
                force=force,
                progress=progress,
            )
        return build(load_map(folder), request, out, validate=validate, force=force, progress=progress)
