"""What each verb of the command line does with its arguments. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packager.planning.plan import LoadedMap, Request
    from packager.profile import DeviceProfile
    from packager.scoring.acip.training import AcipSettings
    from packager.scoring.polish_plan import Polishing
    from packager.scoring.score import ScoreSettings

_CHECK_FAILED = 3
SOME_SIZES = 8
_ANY_PROFILE = "laptop-16gb"  # where no device is named: its graphs run here, and it bounds nothing


def pack(arguments: argparse.Namespace) -> int:
    """Score if needed, plan, build and validate."""
    from packager.pipeline import pack

    request = _request(arguments)
    with _progress() as progress:
        built = pack(
            arguments.model,
            request,
            arguments.output,
            calibration_paths=arguments.calibration,
            settings=_settings(arguments, request.profile.provider, float_only=not request.profile.bits),
            device=arguments.device,
            validate=not arguments.no_validate,
            force=arguments.force,
            progress=progress,
            cache=arguments.map,
        )
    return _show_built(arguments, built)


def score(arguments: argparse.Namespace) -> int:
    """Compute a map."""
    from packager.cli import render
    from packager.scoring.score import score_model
    from packager.source.checkpoint import open_checkpoint

    with _progress() as progress:
        done = score_model(
            open_checkpoint(arguments.model),
            arguments.output,
            _settings(arguments, arguments.provider, float_only=False),
            calibration_paths=arguments.calibration,
            device=arguments.device,
            force=arguments.force,
            progress=progress,
        )
    identity = done.identity
    if arguments.json:
        costs = {
            "seconds": done.seconds,
            "peak_bytes": done.peak_bytes,
            "nats_per_byte": done.nats_per_byte,
            "warnings": done.warnings,
        }
        print(json.dumps({"identity": identity.to_dict()} | costs, indent=2))
        return 0
    print(f"score map of {identity.model.name} written to {arguments.output}")
    print(render.score_text(identity, done.nats_per_byte, done.seconds, done.peak_bytes))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Show what would fit."""
    from packager.cli import render
    from packager.io.files import dump_json
    from packager.io.outputs import require_file, write_output
    from packager.planning.plan import is_plan

    if arguments.output:
        inputs = [arguments.map, Path(arguments.profile)]
        require_file(arguments.output, force=arguments.force, ours=is_plan, inputs=inputs)
    loaded, request = _load(arguments.map), _request(arguments)
    frontier = request.frontier(loaded) if arguments.context == "auto" else ()
    plan = frontier[0] if frontier else request.plan(loaded)
    if arguments.output:
        write_output(arguments.output, dump_json(plan.to_dict()).encode())
    if arguments.json:
        print(dump_json(plan.to_dict() | ({"frontier": render.frontier_dicts(frontier)} if frontier else {})))
    else:
        print(
            "\n".join(
                [render.plan_text(plan, request.wanted_tokens), *([render.frontier_text(frontier)] if frontier else [])]
            )
        )
    return 0


def curve(arguments: argparse.Namespace) -> int:
    """Show what every size costs."""
    from packager.cli import render
    from packager.cli.plot import curve_picture, require_plot
    from packager.errors import UsageError
    from packager.io.files import dump_json
    from packager.io.outputs import require_file, write_output
    from packager.planning.plan import Request
    from packager.planning.size_curve import evenly, predict
    from packager.profile import load_profile

    if arguments.output:
        require_plot(arguments.output)
        inputs = [arguments.map, *([arguments.text] if arguments.text else [])]
        require_file(arguments.output, force=arguments.force, inputs=inputs)
    if arguments.windows < 1:
        raise UsageError(f"--windows {arguments.windows}: expected at least 1")
    loaded = _load(arguments.map)
    profile = load_profile(arguments.profile or _ANY_PROFILE)
    request = Request(profile=profile, context_tokens=arguments.context)
    curve, plans = predict(loaded, request, arguments.sizes, by_peak=arguments.profile is not None)
    wanted = SOME_SIZES if arguments.measure is None and arguments.text else arguments.measure
    if wanted is not None:
        from packager.validation.measure_sizes import heldout_sample, measure, text_sample

        chosen = {position: plans[position] for position in evenly(wanted, len(plans))}
        with _progress() as progress:
            sample = (
                text_sample(loaded, arguments.text, arguments.windows) if arguments.text else heldout_sample(loaded)
            )
            curve = measure(loaded, profile, curve, chosen, sample, progress=progress)
    if arguments.output:
        write_output(arguments.output, curve_picture(curve, arguments.output.suffix))
    print(dump_json(curve.to_dict()) if arguments.json else render.curve_text(curve))
    return 0 if curve.measurement is None or curve.measurement.monotone else _CHECK_FAILED


def build(arguments: argparse.Namespace) -> int:
    """Build a bundle from a map."""
    from packager.pipeline import build

    loaded = _load(arguments.map)
    with _progress() as progress:
        built = build(
            loaded,
            _request(arguments),
            arguments.output,
            validate=not arguments.no_validate,
            force=arguments.force,
            progress=progress,
            polishing=_polishing(arguments),
        )
    return _show_built(arguments, built)


def _polishing(arguments: argparse.Namespace) -> Polishing | None:
    from packager.errors import UsageError

    if arguments.polish is None:
        return None
    if arguments.polish <= 0 or arguments.model is None:
        raise UsageError("--polish needs minutes above 0 and the map's own model: --polish 10 --model FOLDER")
    from packager.scoring.polish_plan import Polishing
    from packager.source.checkpoint import open_checkpoint

    return Polishing(
        checkpoint=open_checkpoint(arguments.model), minutes=arguments.polish, calibration_paths=arguments.calibration
    )


def validate(arguments: argparse.Namespace) -> int:
    """Check a bundle."""
    from packager.bundle.writer import open_bundle
    from packager.cli import render
    from packager.errors import OutputError
    from packager.io.failures import explained
    from packager.io.files import dump_json
    from packager.validation.report import REPORT_FILE, earlier_rounds, write_report
    from packager.validation.validate import validate_bundle

    manifest = open_bundle(arguments.bundle)
    with _progress() as progress:
        report = validate_bundle(
            arguments.bundle,
            manifest,
            progress=progress,
            rounds=earlier_rounds(arguments.bundle, manifest.bundle_sha256),
        )
    try:
        with explained(arguments.bundle / REPORT_FILE):
            write_report(report, arguments.bundle)
    except OutputError as error:
        print(f"packager: the report is not kept: {error}", file=sys.stderr)
    print(dump_json(report.to_dict()) if arguments.json else render.report_text(report))
    return 0 if report.passed else _CHECK_FAILED


def run(arguments: argparse.Namespace) -> int:
    """Generate text."""
    from packager.bundle.writer import open_bundle
    from packager.runtime.sessions import generate

    open_bundle(arguments.bundle)
    pieces = generate(arguments.bundle, arguments.prompt, most_tokens=arguments.tokens, chat=not arguments.raw)
    if arguments.json:
        print(json.dumps({"prompt": arguments.prompt, "text": "".join(pieces)}, ensure_ascii=False))
        return 0
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Say what lies in a folder."""
    from packager.cli import render
    from packager.io.files import dump_json

    described = render.describe(arguments.path)
    print(dump_json(described) if arguments.json else render.description_text(described))
    return 0


def profiles(arguments: argparse.Namespace) -> int:
    """List or show device profiles, or calibrate one."""
    from packager.cli import render
    from packager.errors import UsageError
    from packager.io.files import dump_json
    from packager.profile import load_profile, shipped_profiles

    if arguments.action == "calibrate":
        return _calibrate(arguments)
    if arguments.action == "show":
        if not arguments.name:
            raise UsageError("profiles show: which one? 'packager profiles' lists them")
        profile = load_profile(arguments.name)
        print(dump_json(render.profile_dict(profile)) if arguments.json else render.profile_text(profile))
        return 0
    known = [load_profile(name) for name in shipped_profiles()]
    print(
        dump_json({"profiles": [render.profile_dict(profile) for profile in known]})
        if arguments.json
        else render.profiles_text(known)
    )
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from packager.cli import render
    from packager.errors import UsageError
    from packager.io.files import dump_json
    from packager.io.outputs import require_file, write_output
    from packager.profile import load_profile, with_memory

    out: Path | None = arguments.output
    if not arguments.base or out is None or out.suffix != ".toml":
        raise UsageError("profiles calibrate: expected --base NAME and -o FILE.toml")
    base = load_profile(arguments.base)
    require_file(out, force=arguments.force)
    from packager.memory.calibrate import calibrate

    with _progress() as progress:
        found = calibrate(base, out.parent, progress)
    write_output(out, with_memory(base, found.section()).encode())
    print(dump_json(found.to_dict() | {"profile": str(out)}) if arguments.json else render.calibration_text(found))
    if not arguments.json:
        print(f"profile: {out}")
    return 0


def _show_built(arguments: argparse.Namespace, built: Any) -> int:
    from packager.cli import render
    from packager.io.files import dump_json

    if arguments.json:
        report = built.report.to_dict() if built.report else None
        print(
            dump_json(
                {
                    "bundle": str(arguments.output),
                    "plan": built.plan.to_dict(),
                    "polish": built.manifest.polish,
                    "report": report,
                }
            )
        )
    else:
        print(render.plan_text(built.plan, _request(arguments).wanted_tokens))
        if built.manifest.polish:
            print(render.polish_text(built.manifest.polish))
        if built.report:
            print(render.report_text(built.report))
        print(f"bundle: {arguments.output}")
    return 0 if built.report is None or built.report.passed else _CHECK_FAILED


def _load(path: Path) -> LoadedMap:
    from packager.planning.plan import load_map

    return load_map(path)


def _request(arguments: argparse.Namespace) -> Request:
    from packager.planning.plan import Request
    from packager.profile import load_profile

    profile = load_profile(arguments.profile)
    budget = _budget(arguments.budget, profile)
    return Request(profile=profile, budget_bytes=budget, context_tokens=arguments.context, cache=arguments.kv_cache)


def _budget(text: str | None, profile: DeviceProfile) -> int | None:
    from packager.sizes import parse_size

    return None if text is None else parse_size(text, of_bytes=profile.memory_bytes)


def _settings(arguments: argparse.Namespace, provider: str, *, float_only: bool) -> ScoreSettings:
    from packager.scoring.score import QUICK_TOKENS, ScoreSettings

    tokens = min(arguments.tokens, QUICK_TOKENS) if arguments.quick else arguments.tokens
    return ScoreSettings(
        tokens=tokens,
        seed=arguments.seed,
        quick=arguments.quick,
        provider=provider,
        float_only=float_only or arguments.float_only,
        acip=_acip_settings(arguments),
    )


def _acip_settings(arguments: argparse.Namespace) -> AcipSettings | None:
    """None for the curvature method, whose settings these are not."""
    from packager.errors import UsageError
    from packager.scoring.acip.training import QUICK_ACIP, AcipSettings

    fields = {
        "steps": "steps",
        "tokens": "step_tokens",
        "tuning": "tuning_steps",
        "rank": "adapter_rank",
        "rate": "adapter_rate",
    }
    fields |= {"stop": "stop_ratio", "basis": "basis"}
    given = {
        field: value for name, field in fields.items() if (value := getattr(arguments, f"acip_{name}")) is not None
    }
    if arguments.method != "acip":
        if given:
            raise UsageError("the --acip-… settings are of another method: add --method acip, or leave them out")
        return None
    return dataclasses.replace(QUICK_ACIP if arguments.quick else AcipSettings(), **given)


def _progress() -> Any:
    from packager.cli.progress_bars import Bars

    return Bars()
