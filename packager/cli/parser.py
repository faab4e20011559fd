"""The arguments of the `packager` command, verb by verb."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from packager import __version__
from packager.api import arguments as rules
from packager.api.calls import SOME_SIZES
from packager.cli import completion, verbs
from packager.errors import UsageError

_MODEL = "a Hugging Face folder, a hub name (owner/name or owner/name@revision), a .gguf file, or 'demo'"
VERBS = ("pack", "score", "plan", "curve", "build", "validate", "run", "inspect", "profiles")


class _PrintCompletion(argparse.Action):
    """Prints a shell's completion and ends, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """The script goes to stdout."""
        print(completion.script(parser, str(values)))
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """One that raises what it finds, for the command to say it as it says other errors."""

    def error(self, message: str) -> NoReturn:
        """Shows how the verb is called; UsageError in the place of an exit."""
        self.print_usage(sys.stderr)
        raise UsageError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line; `verb` among them is the function to call. UsageError says what is wrong."""
    parser = _make_parser()
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is not None and verb not in (*VERBS, *completion.SHELLS):
        near = difflib.get_close_matches(verb, VERBS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(VERBS)}"
        parser.error(f"{verb!r} is no verb: {hint}")
    return parser.parse_args(argv)


def asked_for(flag: str, argv: Sequence[str]) -> bool:
    """Whether a long flag, or what it may be shortened to, is among words of which perhaps nothing can be parsed."""
    short = {"--verbose": "-v"}.get(flag)
    own = argv[: argv.index("--")] if "--" in argv else argv
    return any((len(word) > 3 and flag.startswith(word)) or word == short for word in own)


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="packager",
        description="Pack a language model for a device: one score map, any size, a validated ONNX bundle.",
        epilog="exit status: 0 done, 1 error, 2 usage, 3 a check failed, 4 the budget is infeasible",
    )
    parser.add_argument("--version", action="version", version=f"packager {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=completion.SHELLS,
        help="print what makes a shell complete these commands (needs the extra 'completion')",
    )
    _verbosity(parser, default=False)
    subparsers = parser.add_subparsers(required=True, metavar="VERB")

    pack = _verb(
        subparsers,
        "pack",
        verbs.pack,
        "score, plan, build and validate in one go",
        "packager pack demo --profile edge-box-256mb -o box.bundle\n"
        "  packager pack ./SmolLM2-135M --profile raspberry-pi-5-8gb --budget 300MiB --context 2048 -o pi.bundle",
    )
    pack.add_argument("model", metavar="MODEL", help=_MODEL)
    _target(pack)
    _scoring(pack, show_acip=False)
    pack.add_argument("-o", "--output", type=path, required=True, metavar="BUNDLE", help="folder to write")
    pack.add_argument(
        "--map",
        type=path,
        metavar="MAP",
        help="where the score map is kept or found (default: MODEL.map beside the bundle)",
    )
    _writing(pack, "replace an existing bundle, and a map there of other settings")

    score = _verb(
        subparsers,
        "score",
        verbs.score,
        "compute the score map of a model, once",
        "packager score ./SmolLM2-135M -o smol.map --calibration my-text.txt",
    )
    score.add_argument("model", metavar="MODEL", help=_MODEL)
    score.add_argument("-o", "--output", type=path, required=True, metavar="MAP", help="folder to write")
    _scoring(score, show_acip=True)
    score.add_argument(
        "--provider",
        choices=rules.PROVIDER.words,
        default="cpu",
        help="execution provider of the profiles that the map is for (default: cpu)",
    )
    score.add_argument("--force", action="store_true", help="replace an existing map")

    plan = _verb(
        subparsers,
        "plan",
        verbs.plan,
        "choose the best model that fits; needs no model and no runtime",
        "packager plan smol.map --profile edge-box-256mb\n"
        "  packager plan smol.map --profile laptop-16gb --budget 10% --json\n"
        "  packager plan smol.map --profile laptop-16gb --budget 300MiB --context auto",
    )
    plan.add_argument("map", type=path, metavar="MAP")
    _target(plan)
    plan.add_argument("-o", "--output", type=path, metavar="FILE", help="write plan.json here, over an older plan too")
    plan.add_argument("--force", action="store_true", help="replace an existing FILE that is no plan")

    curve = _verb(
        subparsers,
        "curve",
        verbs.curve,
        "what every size costs: predicted at once, measured on demand",
        "packager curve smol.map\n  packager curve smol.map --profile edge-box-256mb -o curve.svg\n"
        "  packager curve smol.map --measure 30 --text mine.txt -o curve.png",
    )
    curve.add_argument("map", type=path, metavar="MAP")
    curve.add_argument(
        "--profile",
        metavar="P",
        help="bound peak memory on this device (a name or a TOML file) in place of the weights file's bytes",
    )
    curve.add_argument(
        "--context",
        type=_of(rules.CONTEXT_TOKENS),
        metavar="N",
        help="tokens the sizes are bounded to, with --profile (default: the profile's)",
    )
    curve.add_argument(
        "--sizes",
        type=_of(rules.SIZES),
        default=30,
        metavar="N",
        help="sizes on the curve, from smallest to largest (default: 30)",
    )
    curve.add_argument(
        "--measure",
        type=_of(rules.SIZES),
        nargs="?",
        const=SOME_SIZES,
        metavar="N",
        help="build N of them (default: 8, both ends among them) and measure their loss on ONNX Runtime",
    )
    curve.add_argument(
        "--text",
        type=path,
        metavar="FILE",
        help="measure on this text (.txt, .jsonl, .parquet) in place of the map's held-out windows",
    )
    curve.add_argument(
        "--windows",
        type=_of(rules.WINDOWS),
        default=8,
        metavar="N",
        help="windows of 512 tokens of --text to measure on (default: 8)",
    )
    curve.add_argument(
        "-o",
        "--output",
        type=path,
        metavar="FILE",
        help="draw the curve: FILE.png or FILE.svg (needs the extra 'plot')",
    )
    curve.add_argument("--force", action="store_true", help="replace an existing FILE")

    build = _verb(
        subparsers,
        "build",
        verbs.build,
        "build a bundle from a score map",
        "packager build smol.map --profile edge-box-256mb -o box.bundle",
    )
    build.add_argument("map", type=path, metavar="MAP")
    _target(build)
    build.add_argument("-o", "--output", type=path, required=True, metavar="BUNDLE", help="folder to write")
    build.add_argument(
        "--polish",
        type=_of(rules.MINUTES),
        nargs="?",
        const=10.0,
        metavar="MINUTES",
        help=(
            "tune the block scales of this one size against the original model (--model) for so "
            "many minutes (default: 10)"
        ),
    )
    build.add_argument(
        "--model",
        metavar="MODEL",
        help=f"the map's own model, for --polish: {_MODEL}",
    )
    build.add_argument(
        "--calibration",
        type=path,
        action="append",
        default=[],
        metavar="PATH",
        help="text to polish on (default: built-in text); may be repeated",
    )
    _writing(build, "replace an existing bundle")

    validate = _verb(
        subparsers,
        "validate",
        verbs.validate,
        "check a bundle on this machine's runtime",
        "packager validate box.bundle --json",
    )
    validate.add_argument("bundle", type=path, metavar="BUNDLE")

    run = _verb(
        subparsers,
        "run",
        verbs.run,
        "generate text with a bundle",
        'packager run box.bundle --prompt "What is a solver?"\n  packager run box.bundle < question.txt\n'
        "  packager run box.bundle --chat --temperature 0.7 --top-p 0.9",
    )
    run.add_argument("bundle", type=path, metavar="BUNDLE")
    run.add_argument(
        "--prompt", metavar="TEXT", help="what to answer; '-', or no --prompt with input piped in: standard input"
    )
    run.add_argument("--chat", action="store_true", help="ask and answer in turn, until the end of the input or Ctrl-C")
    run.add_argument("--system", metavar="TEXT", help="a system line before the prompt or the conversation")
    run.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    run.add_argument(
        "--tokens",
        type=_of(rules.ANSWER_TOKENS),
        default=128,
        metavar="N",
        help="at most this many new tokens an answer (default: 128)",
    )
    run.add_argument(
        "--temperature",
        type=_of(rules.TEMPERATURE),
        default=0.0,
        metavar="X",
        help="let chance choose tokens, the more the higher (default: 0, always the likeliest)",
    )
    run.add_argument(
        "--top-p",
        type=_of(rules.TOP_P),
        default=1.0,
        metavar="P",
        help="among the likeliest that together have this probability (default: 1)",
    )
    run.add_argument(
        "--top-k", type=_of(rules.TOP_K), default=0, metavar="K", help="among the K likeliest (default: 0, all)"
    )
    run.add_argument(
        "--seed",
        type=_of(rules.SAMPLING_SEED),
        metavar="N",
        help="choose the same each time (default: other choices each time)",
    )

    inspect = _verb(
        subparsers,
        "inspect",
        verbs.inspect,
        "say what a map, plan or bundle holds",
        "packager inspect smol.map\n  packager inspect box.bundle --json",
    )
    inspect.add_argument("path", type=path, metavar="PATH")

    profiles = _verb(
        subparsers,
        "profiles",
        verbs.profiles,
        "list the device profiles, show one, or measure this machine's memory coefficients into one",
        "packager profiles\n  packager profiles show edge-box-256mb\n  packager profiles calibrate --base "
        "raspberry-pi-5-8gb -o my-pi.toml",
    )
    profiles.add_argument(
        "action",
        nargs="?",
        choices=["show", "calibrate"],
        help="show one profile, or calibrate one on this machine (a minute or two)",
    )
    profiles.add_argument("name", nargs="?", metavar="NAME", help="show: a profile's name or a TOML file")
    profiles.add_argument("--base", metavar="NAME", help="calibrate: the profile whose other values are taken")
    profiles.add_argument("-o", "--output", type=path, metavar="FILE", help="calibrate: the .toml file to write")
    profiles.add_argument("--force", action="store_true", help="calibrate: replace an existing file")
    return parser


def _verb(subparsers: Any, name: str, function: Any, text: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"examples:\n  {examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=function)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    _verbosity(parser, default=argparse.SUPPRESS)
    return parser


def _verbosity(parser: argparse.ArgumentParser, *, default: Any) -> None:
    """Flags that may stand before the verb and behind it; behind it only what was given overrides."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-q", "--quiet", action="store_true", default=default, help="no progress and no warnings")
    which.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=default,
        help="also say versions and folders, and where an error happened",
    )


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", required=True, metavar="P", help="a device profile's name or a TOML file")
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="memory for the whole process: bytes, 1.5GiB, or 60%% of the device's (default: the profile's)",
    )
    parser.add_argument(
        "--context",
        type=_of(rules.CONTEXT),
        metavar="N",
        help="tokens the bundle is bounded to, prompt and answer together (default: the profile's); "
        "'auto': the profile's minimum, and beyond it what costs no quality",
    )
    parser.add_argument(
        "--kv-cache",
        choices=rules.KV_CACHE.words,
        help=(
            "key/value cache of floats, of 8-bit codes, or whichever is predicted to lose less "
            "(default: the profile's, else auto)"
        ),
    )
    parser.add_argument(
        "--fill",
        action="store_true",
        help="take the largest model that fits (default: the smallest within 0.002 nats of its predicted loss)",
    )
    parser.add_argument(
        "--max-rise",
        type=_of(rules.RISE_NATS),
        metavar="NATS",
        help="take the smallest model whose predicted rise of the loss is at most that, in nats per token",
    )
    parser.add_argument(
        "--file-size", metavar="SIZE", help="graph and weights together take at most that: bytes, or 90MB, 1.5GiB"
    )
    parser.add_argument(
        "--ratio",
        type=_of(rules.RATIO),
        metavar="SHARE",
        help="the weights take at most that share of the float16 model's bytes, such as 0.3",
    )


def path(text: str) -> Path:
    """A path; an empty text would mean the folder that the command runs in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found ''")
    return Path(text)


def _of(rule: rules.Rule[Any]) -> Callable[[str], Any]:
    """argparse's way to ask a rule."""

    def convert(text: str) -> Any:
        try:
            value = rule.kind(text)
        except ValueError:
            value = text
        try:
            return rule.check(value)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _scoring(parser: argparse.ArgumentParser, *, show_acip: bool) -> None:
    parser.add_argument(
        "--calibration",
        type=path,
        action="append",
        default=[],
        metavar="PATH",
        help="text to calibrate on: .txt, .jsonl (field 'text') or .parquet; may be repeated",
    )
    parser.add_argument(
        "--tokens", type=_of(rules.TOKENS), default=32768, metavar="N", help="calibration tokens (default: 32768)"
    )
    parser.add_argument("--seed", type=_of(rules.SEED), default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer tokens and options: a rougher map in a fraction of the time"
    )
    parser.add_argument(
        "--device",
        type=_of(rules.DEVICE),
        default="cpu",
        metavar="D",
        help="torch device to score on: cpu, cuda or cuda:N (default: cpu)",
    )
    parser.add_argument(
        "--float-only",
        action="store_true",
        help="low rank in float instead of low-bit codes, for devices without kernels for these",
    )
    parser.add_argument(
        "--method", choices=rules.METHOD.words, default="curvature", help="how units are scored (default: curvature)"
    )
    acip = parser.add_argument_group(
        "ACIP",
        "the defaults are those published, or with --quick some that two cores can bear"
        if show_acip
        else "settings of --method acip: 'packager score --help' lists them",
    )

    def said(text: str) -> str:
        return text if show_acip else argparse.SUPPRESS

    acip.add_argument(
        "--acip-steps",
        type=_of(rules.ACIP["steps"]),
        metavar="N",
        help=said("optimiser steps that the schedule is laid over (2000, quick 80)"),
    )
    acip.add_argument(
        "--acip-tokens",
        type=_of(rules.ACIP["step_tokens"]),
        metavar="N",
        help=said("tokens in an optimiser step (4096, quick 256)"),
    )
    acip.add_argument(
        "--acip-tuning",
        type=_of(rules.ACIP["tuning_steps"]),
        metavar="N",
        help=said("steps of tuning the adapters after pruning (1000, quick 40)"),
    )
    acip.add_argument(
        "--acip-rank",
        type=_of(rules.ACIP["adapter_rank"]),
        metavar="N",
        help=said("rank of the adapters (32, quick 8)"),
    )
    acip.add_argument(
        "--acip-rate",
        type=_of(rules.ACIP["adapter_rate"]),
        metavar="X",
        help=said("learning rate of the adapters (5e-5, quick 5e-4)"),
    )
    acip.add_argument(
        "--acip-stop",
        type=_of(rules.ACIP["stop_ratio"]),
        metavar="X",
        help=said("share of the layers' elements at which pruning stops (0.4)"),
    )
    acip.add_argument(
        "--acip-basis",
        choices=rules.ACIP_BASIS.words,
        help=said("what layers are taken apart by: their curvature, or as published their weights"),
    )


def _writing(parser: argparse.ArgumentParser, replaces: str) -> None:
    parser.add_argument("--no-validate", action="store_true", help="skip validation on the runtime")
    parser.add_argument("--force", action="store_true", help=replaces)
