"""Plans, reports and artefacts as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from packager.bundle.manifest import Polish
from packager.bundle.opening import OpenedBundle
from packager.cli.screen import Screen
from packager.planning.plan import Plan
from packager.planning.shortfall import MARGIN_TEXT
from packager.planning.size_curve import BY_PEAK, MOST_NOISE, Curve
from packager.planning.target import BUDGET, FILE_SIZE, KNEE, KNEE_NATS, LARGEST, MAX_RISE, RATIO
from packager.profile import DeviceProfile
from packager.scoremap.identity import MapIdentity
from packager.scoremap.opening import OpenedMap
from packager.sizes import format_size
from packager.validation.advice import columns, verdict_lines
from packager.validation.report import ValidationReport, round_text, verdict, verdict_of

if TYPE_CHECKING:
    from packager.memory.calibrate import MeasuredCoefficients

_BAR = 30


def plan_text(plan: Plan, wanted_tokens: int = 0) -> str:
    """What was chosen, what it is predicted to weigh and cost, and where the memory goes; `wanted_tokens` is the
    context that the profile has, where the plan was to have it."""
    terms = plan.memory.terms
    width = max(28, *map(len, terms), len(MARGIN_TEXT) if plan.margin_bytes else 0)
    whole = max(plan.budget_bytes, plan.peak_bytes, 1)
    bounded = (
        f", all that the model was made for ({plan.profile} has {wanted_tokens})"
        if wanted_tokens > plan.context_tokens
        else ""
    )
    lines = [
        f"profile      {plan.profile}: budget {format_size(plan.budget_bytes)}, context {plan.context_tokens} "
        f"tokens{bounded}",
        f"chosen       {format_size(plan.file_bytes)} of weights, {plan.ratio:.1%} of the float16 model "
        f"({plan.prefix} of {plan.moves} compression steps taken)",
        *([f"bound        {_bound_text(plan)}"] if plan.bound else []),
        f"forms        {forms_text(plan.choices.values())}",
        f"cache        {plan.cache}"
        + (f" (+{plan.cache_nats:.4f} nats)" if plan.cache_nats else "")
        + (f": {plan.cache_note}" if plan.cache_note else ""),
        f"predicted    loss +{plan.loss_nats:.4f} nats per token; peak {format_size(plan.peak_bytes)} in "
        f"{plan.memory.peak_phase}",
    ]
    for name, size in terms.items():
        lines.append(f"  {name:{width}} {format_size(size):>10}  {'█' * max(0, round(_BAR * size / whole))}")
    if plan.margin_bytes:
        share = "█" * round(_BAR * plan.margin_bytes / whole)
        lines.append(f"  {MARGIN_TEXT:{width}} {format_size(plan.margin_bytes):>10}  {share}")
    left = plan.budget_bytes - plan.peak_bytes - plan.margin_bytes
    # Only a later round of the closed loop plans beyond the budget, by what an earlier one measured below its
    # prediction.
    lines.append(
        f"  {'fits, left' if left >= 0 else 'beyond it, as measured less':{width}} {format_size(abs(left)):>10}"
    )
    return "\n".join(lines)


def _bound_text(plan: Plan) -> str:
    """Why the size is what it is."""
    if plan.bound == KNEE:
        return (
            f"budget allows {format_size(plan.allowed_bytes)} of weights; beyond {format_size(plan.file_bytes)} "
            f"nothing is won that one could measure ({KNEE_NATS:g} nats; --fill takes them)"
        )
    return {
        BUDGET: f"the budget: nothing that fits is better by {KNEE_NATS:g} nats",
        MAX_RISE: "max-rise: a smaller model is predicted to lose more",
        FILE_SIZE: f"file-size: nothing within it is better by {KNEE_NATS:g} nats",
        RATIO: f"ratio: nothing within it is better by {KNEE_NATS:g} nats",
        LARGEST: "none: it is the largest that the map has for this device",
    }.get(plan.bound, plan.bound)


def score_text(
    identity: MapIdentity, nats_per_byte: float, seconds: Mapping[str, float], peak_bytes: int | None
) -> str:
    """What a map was calibrated on, and what making it took."""
    calibration = identity.calibration
    loss = f"{identity.losses.heldout_nats:.4f} nats per token, {nats_per_byte:.4f} per byte"
    lines = [f"calibrated on {calibration.text}: {calibration.tokens} tokens; held-out loss {loss}"]
    lines += [f"  {phase:24} {taken:8.1f} s" for phase, taken in seconds.items()]
    lines.append(f"  {'total':24} {sum(seconds.values()):8.1f} s")
    if peak_bytes is not None:
        lines.append(f"  {'peak memory':24} {format_size(peak_bytes):>10}")
    return "\n".join(lines)


def frontier_dicts(frontier: Sequence[Plan]) -> list[dict[str, Any]]:
    """What each plan of a frontier trades, as plain data."""
    keys = ("context_tokens", "cache", "file_bytes", "ratio", "loss_nats", "peak_bytes")
    return [{key: getattr(plan, key) for key in keys} for plan in frontier]


def frontier_text(frontier: Sequence[Plan]) -> str:
    """Context against weights within one budget, the plan that is taken marked."""
    lines = [
        f"context against weights within {format_size(frontier[0].budget_bytes)} ('--context N' takes another row)"
    ]
    lines.append(f"  {'context':>9} {'cache':>6} {'weights':>10} {'ratio':>7} {'loss, nats':>11} {'peak':>10}")
    for plan in frontier:
        what = f"{plan.context_tokens:>9} {plan.cache:>6} {format_size(plan.file_bytes):>10} {plan.ratio:>7.1%}"
        row = f"  {what} {plan.loss_nats:>+11.4f} {format_size(plan.peak_bytes):>10}"
        lines.append(row + ("  taken" if plan is frontier[0] else ""))
    return "\n".join(lines)


def polish_text(polish: Polish) -> str:
    """What tuning the block scales came to."""
    before, after = polish.heldout_divergence_before_nats, polish.heldout_divergence_after_nats
    kept = f"{polish.units} units" if polish.units else "thrown away, it was no better"
    return (
        f"polished     {polish.steps} steps in {polish.minutes:g} min: divergence on held-out "
        f"text {before:.4f} -> {after:.4f} nats per token ({kept})"
    )


def forms_text(labels: Any) -> str:
    """How many units take each form, the commonest first."""
    return ", ".join(f"{count} × {label}" for label, count in Counter(labels).most_common())


def curve_text(curve: Curve) -> str:
    """A sweep as a table, and what its measured sizes say."""
    measurement, by_peak = curve.measurement, curve.bounded == BY_PEAK
    header = ["weights, bytes", "bits/weight", *(["peak memory"] if by_peak else []), "predicted"]
    rows = [[*header, "measured", "over the next larger"] if measurement else header]
    for point in curve.points:
        peak = [format_size(point.peak_bytes)] if by_peak else []
        row = [f"{point.file_bytes:,}", f"{point.bits_per_weight:.2f}", *peak, f"{point.predicted_nats:+.4f}"]
        if point.measured is not None:
            row.append(_with_noise(point.measured.rise_nats, point.measured.noise_nats))
            row.append(_with_noise(point.measured.step_nats, point.measured.step_noise_nats))
        rows.append(row)
    where = f", on {curve.profile} at a context of {curve.context_tokens} tokens" if by_peak else ""
    lines = [f"{curve.model}: {len(curve.points)} sizes by {curve.bounded}{where}"]
    lines += _table(rows, right=True)
    lines.append("losses are rises over the source model, in nats per token; ± is the standard error")
    if measurement is not None:
        lines.append(
            f"measured on ONNX Runtime: {measurement.text}, {measurement.windows} windows, {measurement.tokens:,} "
            f"tokens; source {measurement.source_nats:.4f}"
        )
        verdict_ = "no size measures" if measurement.monotone else "NOT MONOTONE: a size measures"
        lines.append(
            f"{verdict_} better than the next larger one by more than {MOST_NOISE:g} standard errors of their "
            "difference"
        )
    return "\n".join(lines)


def _with_noise(nats: float | None, noise: float | None) -> str:
    return "" if nats is None else f"{nats:+.4f} ± {noise:.4f}"


def _table(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Rows as lines of aligned columns; short rows end early."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join(cells).rstrip())
    return lines


def report_text(report: ValidationReport) -> str:
    """The checks as a table, the builds, an answer, then the verdict with causes and next steps."""
    screen = Screen()
    colours = {True: "green", False: "bold red", None: "dim"}
    rows = [(check.name, *columns(check), f"[{colours[check.passed]}]{verdict(check)}[/]") for check in report.checks]
    lines = [screen.table(("check", "measured", "allowed", "verdict"), rows, marked=3, widest=0)]
    lines += [screen.wrapped(round_text(number, item)) for number, item in enumerate(report.rounds, 1)]
    if not report.enforced_by:
        lines.append(screen.wrapped("memory limit: not enforced, this system offers no cgroup to this user"))
    if report.answer:
        lines.append(screen.wrapped(f"asked: {report.answer.prompt}"))
        lines.append(screen.wrapped(f"answered: {report.answer.text.strip()}"))
    first, *rest = verdict_lines(report)
    lines.append(screen.styled(first, "bold green" if report.passed else "bold red"))
    lines += [screen.wrapped(line) for line in rest]
    return "\n".join(lines)


def profile_dict(profile: DeviceProfile) -> dict[str, Any]:
    """A profile as plain data."""
    return {key: value for key, value in asdict(profile).items() if key != "toml"}


def profile_text(profile: DeviceProfile) -> str:
    """The profile's own file, and as a comment below it where its memory coefficients come from."""
    return f"{profile.toml.rstrip()}\n\n# memory coefficients: {profile.coefficients.provenance}"


def calibration_text(found: MeasuredCoefficients) -> str:
    """Every coefficient with its default, then how well they predict processes that the fit has not seen."""
    lines = [
        f"memory coefficients of {found.coefficients.provenance}",
        f"  {'coefficient':32} {'measured':>12} {'before':>12}",
    ]
    for item in found.findings:
        value = "kept" if item.kept else f"{item.value:.4g}"
        lines.append(
            f"  {item.name:32} {value:>12} {item.default:>12.4g}"
            + (f"  {item.kept}" if item.kept else f"  ± {item.error:.2g}" if item.error else "")
        )
    lines += [f"left out: {reason}" for reason in found.failed]
    lines.append(
        f"  {'processes that the fit has not seen':80} {'measured':>9} {'predicted':>9} {'error':>7} {'before':>7}"
    )
    for trial in found.trials:
        sizes = f"{format_size(trial.measured_bytes):>9} {format_size(trial.calibrated_bytes):>9}"
        errors = " ".join(
            f"{predicted / trial.measured_bytes - 1:>+7.1%}" for predicted in (trial.calibrated_bytes, trial.base_bytes)
        )
        lines.append(f"  {trial.name:80} {sizes} {errors}")
    return "\n".join(lines)


def profiles_text(profiles: Sequence[DeviceProfile]) -> str:
    """One row a profile, of several lines where its description is long."""
    rows = [
        (
            profile.name,
            format_size(profile.memory_bytes),
            format_size(profile.budget_bytes),
            str(profile.context_tokens),
            profile.provider,
            profile.description,
        )
        for profile in profiles
    ]
    header = ("profile", "memory", "budget", "context", "runs on", "description")
    return Screen().table(header, rows, right=(1, 2, 3), widest=5)


def describe(found: OpenedMap | OpenedBundle | Plan) -> dict[str, Any]:
    """What a map, a bundle or a plan holds, as plain data."""
    if isinstance(found, OpenedMap):
        sizes = [sum(chain[index].bytes for chain in found.scoremap.options) for index in (0, -1)]
        plain = found.identity.to_dict()
        identity = {key: plain[key] for key in ("model", "calibration", "losses", "int8_cache", "settings", "versions")}
        return {
            "kind": "score map",
            "units": len(found.scoremap.units),
            "moves": len(found.scoremap.moves),
            "largest_bytes": sizes[0],
            "smallest_bytes": sizes[1],
        } | identity
    if isinstance(found, OpenedBundle):
        manifest, verdict_ = found.manifest.to_dict(), verdict_of(found.folder.root)
        shared = {key: manifest[key] for key in ("model", "profile", "bounds", "cache", "predicted", "bundle_sha256")}
        return {
            "kind": "bundle",
            "valid": verdict_.valid,
            "report": verdict_.words or "all checks passed",
            "files": len(manifest["files"]),
            "bytes": sum(entry["bytes"] for entry in manifest["files"]),
            "forms": forms_text(unit["form"] for unit in manifest["units"]),
            "measured": manifest.get("measured"),
        } | shared
    return {"kind": "plan"} | found.to_dict()


def description_text(described: Mapping[str, Any], indent: str = "") -> str:
    """Nested plain data as indented lines: sizes as people write them, other numbers with four digits."""
    return "\n".join(_described(described, indent, in_bytes=False))


def _described(described: Mapping[str, Any], indent: str, *, in_bytes: bool) -> list[str]:
    lines = []
    width = max([24, *(len(key) for key, value in described.items() if not isinstance(value, Mapping))])
    for key, value in described.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}")
            # The terms of a phase are bytes, whatever they are called.
            lines += _described(value, indent + "  ", in_bytes=in_bytes or key == "phases")
        else:
            shown = _plain_value("bytes" if in_bytes else key, value)
            lines.append(f"{indent}{key:{width}} {shown}".rstrip())
    return lines


def _plain_value(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_size(value) if "bytes" in key else str(value) if "seed" in key else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain_value(key, item) for item in value)
    return str(value)
