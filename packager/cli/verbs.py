"""What each verb of the command line does with its arguments: one call of the package's own API, then text or JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import packager
from packager.errors import UsageError

if TYPE_CHECKING:
    from packager.cli.progress_bars import Bars
    from packager.pipeline import Built

_CHECK_FAILED = 3
_ACIP_FLAGS = {
    "steps": "steps",
    "tokens": "step_tokens",
    "tuning": "tuning_steps",
    "rank": "adapter_rank",
    "rate": "adapter_rate",
    "stop": "stop_ratio",
    "basis": "basis",
}
"""`--acip-NAME` of the command line, and what it is called in the settings."""


def pack(arguments: argparse.Namespace) -> int:
    """Score if needed, plan, build and validate."""
    with _progress(arguments) as progress:
        built = packager.pack(
            arguments.model,
            **_target(arguments),
            **_scoring(arguments),
            out=arguments.output,
            map=arguments.map,
            validate=not arguments.no_validate,
            force=arguments.force,
            progress=progress,
        )
    return _show_built(arguments, built)


def score(arguments: argparse.Namespace) -> int:
    """Compute a map."""
    from packager.cli import render

    with _progress(arguments) as progress:
        done = packager.score(
            arguments.model,
            **_scoring(arguments),
            out=arguments.output,
            provider=arguments.provider,
            force=arguments.force,
            progress=progress,
        )
    if arguments.json:
        costs = {
            "seconds": done.seconds,
            "peak_bytes": done.peak_bytes,
            "nats_per_byte": done.nats_per_byte,
            "warnings": done.warnings,
        }
        # The phases in their order.
        _print_json({"identity": done.identity.to_dict()} | costs, sort_keys=False)
    else:
        print(f"score map of {done.identity.model.name} written to {arguments.output}")
        print(render.score_text(done.identity, done.nats_per_byte, done.seconds, done.peak_bytes))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Show what would fit."""
    from packager.cli import render

    target = _target(arguments)
    frontier: tuple[Any, ...] = ()
    if arguments.context == "auto":
        del target["context"]
        frontier = packager.frontier(arguments.map, **target)
    plan = frontier[0] if frontier else packager.plan(arguments.map, **target)
    if arguments.output:
        inputs = [arguments.map, arguments.profile]
        packager.write_plan(plan, out=arguments.output, force=arguments.force, inputs=inputs)
    if arguments.json:
        _print_json(plan.to_dict() | ({"frontier": render.frontier_dicts(frontier)} if frontier else {}))
    else:
        print(render.plan_text(plan, _wanted_tokens(arguments)))
        if frontier:
            print(render.frontier_text(frontier))
    return 0


def curve(arguments: argparse.Namespace) -> int:
    """Show what every size costs."""
    from packager.cli import render
    from packager.cli.plot import curve_picture, require_plot
    from packager.io.outputs import require_file, write_output

    if arguments.output:
        require_plot(arguments.output)
        inputs = [arguments.map, *([arguments.text] if arguments.text else [])]
        require_file(arguments.output, force=arguments.force, inputs=inputs)
    with _progress(arguments) as progress:
        curve = packager.curve(
            arguments.map,
            profile=arguments.profile,
            context=arguments.context,
            sizes=arguments.sizes,
            measure=arguments.measure,
            text=arguments.text,
            windows=arguments.windows,
            progress=progress,
        )
    if arguments.output:
        write_output(arguments.output, curve_picture(curve, arguments.output.suffix))
    if arguments.json:
        _print_json(curve.to_dict())
    else:
        print(render.curve_text(curve))
    return 0 if curve.measurement is None or curve.measurement.monotone else _CHECK_FAILED


def build(arguments: argparse.Namespace) -> int:
    """Build a bundle from a map."""
    with _progress(arguments) as progress:
        built = packager.build(
            arguments.map,
            **_target(arguments),
            out=arguments.output,
            polish=arguments.polish,
            model=arguments.model,
            calibration=arguments.calibration,
            validate=not arguments.no_validate,
            force=arguments.force,
            progress=progress,
        )
    return _show_built(arguments, built)


def validate(arguments: argparse.Namespace) -> int:
    """Check a bundle."""
    from packager.cli import render

    with _progress(arguments) as progress:
        report = packager.validate(arguments.bundle, progress=progress)
    if arguments.json:
        _print_json(report.to_dict())
    else:
        print(render.report_text(report))
    return 0 if report.passed else _CHECK_FAILED


def run(arguments: argparse.Namespace) -> int:
    """Generate text."""
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k", "seed")}
    if arguments.chat:
        from packager.cli.chat import talk

        if unfit := [flag for flag in ("prompt", "raw", "json") if getattr(arguments, flag)]:
            raise UsageError(f"--chat: not together with --{unfit[0]}")
        conversation = packager.chat(arguments.bundle, system=arguments.system, tokens=arguments.tokens, **sampling)
        _warn_of_report(arguments)
        talk(conversation, quiet=arguments.quiet)
        return 0
    from packager.cli.prompt import prompt_of

    prompt = prompt_of(arguments.prompt)
    answer = packager.run(
        arguments.bundle,
        prompt=prompt,
        tokens=arguments.tokens,
        chat=not arguments.raw,
        system=arguments.system,
        **sampling,
    )
    valid = _warn_of_report(arguments)
    if arguments.json:
        text = "".join(answer)
        counts = {"prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens}
        speed = round(answer.tokens_per_second, 2)
        found = {"prompt": prompt, "text": text, "tokens_per_second": speed, "valid": valid}
        _print_json(found | counts)
        return 0
    for piece in answer:
        print(piece, end="", flush=True)
    print()
    if arguments.verbose:
        print(
            f"packager: {answer.tokens} tokens after {answer.prompt_tokens} of the prompt, "
            f"{answer.tokens_per_second:.1f} tokens/s",
            file=sys.stderr,
        )
    return 0


def _warn_of_report(arguments: argparse.Namespace) -> bool | None:
    """Say so where a bundle, which was opened by now, is not known to be valid; whether it is."""
    from packager.validation.report import verdict_of

    verdict = verdict_of(arguments.bundle)
    if verdict.words:
        print(f"packager: warning: {verdict.words}", file=sys.stderr)
    return verdict.valid


def inspect(arguments: argparse.Namespace) -> int:
    """Say what lies in a folder."""
    from packager.cli import render

    described = render.describe(packager.inspect(arguments.path))
    if arguments.json:
        _print_json(described)
    else:
        print(render.description_text(described))
    return 0


def profiles(arguments: argparse.Namespace) -> int:
    """List or show device profiles, or calibrate one."""
    from packager.cli import render

    if arguments.action == "calibrate":
        return _calibrate(arguments)
    if arguments.action == "show":
        if not arguments.name:
            raise UsageError("profiles show: which one? 'packager profiles' lists them")
        profile = packager.load_profile(arguments.name)
        if arguments.json:
            _print_json(render.profile_dict(profile))
        else:
            print(render.profile_text(profile))
        return 0
    known = packager.profiles()
    if arguments.json:
        _print_json({"profiles": [render.profile_dict(profile) for profile in known]})
    else:
        print(render.profiles_text(known))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from packager.cli import render

    if not arguments.base or arguments.output is None or arguments.output.suffix != ".toml":
        raise UsageError("profiles calibrate: expected --base NAME and -o FILE.toml")
    with _progress(arguments) as progress:
        found = packager.calibrate_profile(
            arguments.base, out=arguments.output, force=arguments.force, progress=progress
        )
    if arguments.json:
        _print_json(found.to_dict() | {"profile": str(arguments.output)})
    else:
        print(render.calibration_text(found))
        print(f"profile: {arguments.output}")
    return 0


def _show_built(arguments: argparse.Namespace, built: Built) -> int:
    from packager.cli import render

    if arguments.json:
        _print_json(
            {
                "bundle": str(arguments.output),
                "plan": built.plan.to_dict(),
                "polish": dataclasses.asdict(built.manifest.polish) if built.manifest.polish else None,
                "report": built.report.to_dict() if built.report else None,
            }
        )
    else:
        print(render.plan_text(built.plan, _wanted_tokens(arguments)))
        if built.manifest.polish:
            print(render.polish_text(built.manifest.polish))
        if built.report:
            print(render.report_text(built.report))
        print(f"bundle: {arguments.output}")
    return 0 if built.report is None or built.report.passed else _CHECK_FAILED


def _target(arguments: argparse.Namespace) -> dict[str, Any]:
    """What to build for."""
    return {
        "profile": arguments.profile,
        "budget": arguments.budget,
        "context": arguments.context,
        "kv_cache": arguments.kv_cache,
        "max_rise": arguments.max_rise,
        "file_size": arguments.file_size,
        "ratio": arguments.ratio,
        "fill": arguments.fill,
    }


def _wanted_tokens(arguments: argparse.Namespace) -> int:
    """The profile's context where that is what to build for, else 0."""
    return packager.load_profile(arguments.profile).context_tokens if arguments.context is None else 0


def _scoring(arguments: argparse.Namespace) -> dict[str, Any]:
    """How to score; settings of ACIP only where one was given."""
    given = {
        setting: value
        for flag, setting in _ACIP_FLAGS.items()
        if (value := getattr(arguments, f"acip_{flag}")) is not None
    }
    names = ("calibration", "tokens", "seed", "quick", "device", "float_only", "method")
    return {name: getattr(arguments, name) for name in names} | {"acip": given or None}


def _progress(arguments: argparse.Namespace) -> Bars:
    from packager.cli.progress_bars import Bars

    return Bars(quiet=arguments.quiet, verbose=arguments.verbose)


def _print_json(value: Any, *, sort_keys: bool = True) -> None:
    """One document on stdout, in ASCII, which every terminal and pipe can take."""
    print(json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False))
