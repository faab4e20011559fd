"""The whole way: score if needed, plan, build, validate, tighten, repeat.

When the measured peak exceeds the budget, or leaves much of a binding budget unused, the difference is given to the
solver and the bundle is built again: cheap, for a build is a copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from packager.bundle.folder import BUNDLE, BundleFolder
from packager.bundle.manifest import Manifest
from packager.bundle.opening import OpenedBundle
from packager.bundle.writer import Recipe, stage, with_golden, with_scales, write_manifest
from packager.errors import ArtifactError, InfeasibleBudgetError
from packager.io.outputs import published_folder, refuse_existing, reserved
from packager.planning.plan import Plan, Request
from packager.planning.shortfall import within_error_text
from packager.progress import Progress
from packager.scoremap.folder import MapFolder
from packager.scoremap.opening import OpenedMap, open_map
from packager.sizes import format_size
from packager.validation.acceptance import run_acceptance
from packager.validation.report import Round, ValidationReport
from packager.validation.report_page import write_report

if TYPE_CHECKING:
    from packager.scoremap.settings import ScoreSettings
    from packager.scoring.polish_plan import Polishing

_ROUNDS = 3
_MIB = 1 << 20
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
    opened: OpenedMap,
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
    inputs = [opened.folder.root]
    if polishing is not None:
        inputs += [*polishing.calibration_paths, *polishing.checkpoint.inputs]
    with published_folder(out, BUNDLE, force=force, inputs=inputs) as staging:
        plan, reserve = _first_plan(opened, request, progress) if validate else (request.unmeasured().plan(opened), 0)
        if validate:
            return _validated(opened, request, plan, reserve, staging, progress, polishing)
        recipe = Recipe(source=opened, plan=plan, profile=request.profile)
        bundle = _polished(recipe, _staged(recipe, staging, progress), polishing, progress)
        write_manifest(bundle)
        return Built(plan=plan, manifest=bundle.manifest, report=None)


def _first_plan(opened: OpenedMap, request: Request, progress: Progress) -> tuple[Plan, int]:
    """The plan that the closed loop begins with, and what it keeps free beside its prediction: the margin, where
    anything fits beside it, for a first round that fits is the last. What is measured then takes the margin's place.

    Warns where the budget is nearer to the smallest model's need than predictions are exact.
    """
    margin = request.profile.coefficients.margin_bytes
    try:
        return request.plan(opened, margin), margin
    except InfeasibleBudgetError:
        plan = request.plan(opened)
    progress.warn(within_error_text(margin))
    return plan, 0


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
        """Whether it gave something up, and leaves much of the budget unused that its plan did not mean to leave: a
        plan stops where more bytes win nothing, or where it was asked to."""
        meant = max(0, self.plan.budget_bytes - self.plan.peak_bytes - self.reserve_bytes)
        return self.plan.prefix > 0 and self.room_bytes - meant > _UNUSED_SHARE * self.plan.budget_bytes

    @property
    def tight(self) -> bool:
        """Whether it exceeds the budget or, having something left to give up, comes too near to it."""
        return self.room_bytes < (self.margin_bytes if self.plan.prefix > 0 else 0)

    def reported(self) -> Round:
        """As the report tells of it."""
        return Round(
            context_tokens=self.plan.context_tokens,
            cache=self.plan.cache,
            file_bytes=self.plan.file_bytes,
            loss_nats=self.plan.loss_nats,
            predicted_bytes=self.plan.peak_bytes,
            measured_bytes=self.peak_bytes,
            reserve_bytes=self.reserve_bytes,
        )


def _validated(
    opened: OpenedMap,
    request: Request,
    plan: Plan,
    reserve: int,
    staging: Path,
    progress: Progress,
    polishing: Polishing | None,
) -> Built:
    """Build and measure until it fits, then finish the best build once: scales, golden file, manifest, report."""
    from packager.runtime.providers import require_supported
    from packager.validation.left_out import missing_reference
    from packager.validation.validate import validate_bundle

    require_supported(request.profile.provider)
    rounds, bundle = _closed_loop(opened, request, plan, reserve, staging, progress)
    recipe = Recipe(source=opened, plan=_best(rounds).plan, profile=request.profile)
    bundle, torch_side = _polished(recipe, _moved(bundle, staging), polishing, progress), None
    if missing_reference() is None:
        from packager.validation import reference

        progress.phase("golden outputs in torch", 1)
        torch_side = reference.load_reference(bundle)
        reference.write_golden(torch_side, bundle, bundle.folder.golden)
        bundle = with_golden(bundle)
        progress.advance()
    write_manifest(bundle)  # what is tested is what it says
    report = validate_bundle(
        bundle, progress=progress, rounds=[item.reported() for item in rounds], torch_side=torch_side
    )
    bundle = replace(bundle, manifest=replace(bundle.manifest, measured=report.measured))
    write_manifest(bundle)
    write_report(report, staging)
    return Built(plan=recipe.plan, manifest=bundle.manifest, report=report)


def _closed_loop(
    opened: OpenedMap, request: Request, plan: Plan, kept_free: int, staging: Path, progress: Progress
) -> tuple[list[_Round], OpenedBundle]:
    """Build and measure until the peak fits and the budget is used, three times at most; the first plan keeps
    `kept_free` bytes beside its prediction.

    Returns all rounds and the bundle of the best, which lies in a folder of its own in `staging`: of two builds the
    better is kept, so that none is written twice.
    """
    rounds: list[_Round] = []
    best: OpenedBundle | None = None
    reserve: int | None = kept_free
    # What was measured of one cache says nothing of the other: later rounds keep the first one's.
    kept = replace(request, cache=plan.cache)
    while reserve is not None and len(rounds) < _ROUNDS:
        if rounds:
            again = _planned_again(opened, kept, rounds[-1], reserve)
            if again is None or (again.choices, again.context_tokens) == (
                rounds[-1].plan.choices,
                rounds[-1].plan.context_tokens,
            ):
                break
            plan = replace(again, cache_note=plan.cache_note)
        number = len(rounds) + 1
        recipe = Recipe(source=opened, plan=plan, profile=request.profile)
        bundle = _staged(recipe, staging / f"build-{number}", progress)
        write_manifest(bundle)
        progress.phase(f"measuring its memory (build {number})", 1)
        # A run that failed has no peak: validation will say why.
        peak = run_acceptance(bundle.folder.root, None).peak_bytes or 0
        progress.advance()
        rounds.append(_Round(plan=plan, reserve_bytes=reserve, peak_bytes=peak))
        better = _best(rounds) is rounds[-1]
        worse, best = (best, bundle) if better else (bundle, best)
        if worse is not None:
            shutil.rmtree(worse.folder.root)
        reserve = _next_reserve(rounds[-1]) if peak else None
    assert best is not None
    return rounds, best


def _moved(bundle: OpenedBundle, root: Path) -> OpenedBundle:
    """The bundle, from its folder in `root` into `root` itself."""
    for path in bundle.folder.root.iterdir():
        path.rename(root / path.name)
    bundle.folder.root.rmdir()
    return replace(bundle, folder=BundleFolder(root=root))


def _planned_again(opened: OpenedMap, request: Request, last: _Round, reserve: int) -> Plan | None:
    """The plan that keeps `reserve` free, or at least what was measured beside the prediction; None where the last one,
    which fits, is the smallest. InfeasibleBudgetError where it did not fit."""
    for spare in (reserve, reserve - last.margin_bytes):
        try:
            return request.plan(opened, spare)
        except InfeasibleBudgetError as error:
            refused = error
    if last.room_bytes < 0:
        raise _too_little(last, refused)
    return None


def _too_little(last: _Round, refused: InfeasibleBudgetError) -> InfeasibleBudgetError:
    """What to say where the smallest model, as it was measured, exceeds the budget."""
    least = refused.minimum_bytes
    whole = -(-least // _MIB)
    return InfeasibleBudgetError(
        f"measured {format_size(last.peak_bytes)} ({last.peak_bytes:,} bytes) of a budget of "
        f"{format_size(last.plan.budget_bytes)}; by that the smallest model needs {format_size(least)}: give at least "
        f"{whole} MiB\n{refused}",
        budget_bytes=last.plan.budget_bytes,
        minimum_bytes=least,
        shortfall=refused.shortfall,
    )


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


def _polished(recipe: Recipe, bundle: OpenedBundle, polishing: Polishing | None, progress: Progress) -> OpenedBundle:
    """The bundle with tuned scales, which change neither its bytes nor its memory, where `polishing` is given."""
    if polishing is None:
        return bundle
    from packager.scoring.polish_plan import polish_plan

    scales, polish = polish_plan(recipe.source, recipe.plan, polishing, progress)
    return with_scales(bundle, scales, polish)


def _staged(recipe: Recipe, root: Path, progress: Progress) -> OpenedBundle:
    progress.phase("writing the bundle", 1)
    bundle = stage(recipe, root)
    progress.advance()
    return bundle


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
    map_folder: Path | None = None,
) -> Built:
    """From a model to a bundle: score it unless the map lies in `map_folder` already (where None, beside the bundle),
    then build.

    ArtifactError where the map there is of other settings, for it may have taken hours; `force` replaces it.
    """
    from packager.scoring.score import map_differences, score_model
    from packager.source.checkpoint import open_checkpoint

    refuse_existing(out, BUNDLE, force=force)
    checkpoint = open_checkpoint(source)
    folder = map_folder or out.parent / f"{checkpoint.name}.map"
    with reserved(out, BUNDLE, force=force, inputs=[folder, *checkpoint.inputs, *calibration_paths]):
        differences = (
            map_differences(folder, checkpoint, settings, calibration_paths)
            if MapFolder(root=folder).exists()
            else None
        )
        if differences and not force:
            raise ArtifactError(
                f"{folder} is the map of this model with other settings ({'; '.join(differences)}): keep it and name "
                "another with --map, "
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
        return build(open_map(folder), request, out, validate=validate, force=force, progress=progress)
