"""The command line itself: usage errors, how it ends, and terminals that know few letters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import packager
from packager.cli.command import main
from packager.cli.parser import VERBS, parse
from packager.errors import UsageError

ROOT = Path(packager.__file__).resolve().parent.parent
SCORE = ["score", "m", "-o", "out.map"]
BUILD = ["build", "m.map", "--profile", "laptop-16gb", "-o", "out.bundle"]
PLAN = ["plan", "m.map", "--profile", "laptop-16gb"]
RUN = ["run", "b.bundle", "--prompt", "x"]
LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["plan"], "the following arguments are required: MAP, --profile"),
        (["biuld", "m.map"], "'biuld' is no verb: did you mean build?"),
        (["profile"], "'profile' is no verb: did you mean profiles?"),
        (["frobnicate"], f"'frobnicate' is no verb: expected one of {', '.join(VERBS)}"),
        ([*PLAN, "--kontext", "1"], "unrecognized arguments: --kontext 1"),
        ([*PLAN, "--context", "many"], "argument --context: expected at least 33 tokens, or 'auto', found 'many'"),
        ([*PLAN, "--context", "32"], "argument --context: expected at least 33 tokens, or 'auto', found 32"),
        ([*PLAN, "--context", "-5"], "argument --context: expected at least 33 tokens, or 'auto', found -5"),
        (
            ["curve", "m.map", "--context", "auto"],
            "argument --context: expected a whole number, at least 33, found 'auto'",
        ),
        (
            ["curve", "m.map", "--sizes", "1001"],
            "argument --sizes: expected a whole number from 2 to 1000, found 1001",
        ),
        (["curve", "m.map", "--measure", "1"], "argument --measure: expected a whole number from 2 to 1000, found 1"),
        (["curve", "m.map", "--windows", "0"], "argument --windows: expected a whole number, at least 1, found 0"),
        ([*RUN, "--tokens", "0"], "argument --tokens: expected a whole number, at least 1, found 0"),
        ([*SCORE, "--tokens", "1.5"], "argument --tokens: expected a whole number, at least 1, found '1.5'"),
        ([*SCORE, "--seed", "-1"], f"argument --seed: expected a whole number from 0 to {LARGEST}, found -1"),
        (
            [*SCORE, "--seed", str(LARGEST + 1)],
            f"argument --seed: expected a whole number from 0 to {LARGEST}, found {LARGEST + 1}",
        ),
        ([*SCORE, "--device", "mps"], "argument --device: expected cpu, cuda or cuda:N, found 'mps'"),
        ([*SCORE, "--device", "cuda:-1"], "argument --device: expected cpu, cuda or cuda:N, found 'cuda:-1'"),
        ([*SCORE, "--acip-steps", "0"], "argument --acip-steps: expected a whole number, at least 1, found 0"),
        ([*SCORE, "--acip-tokens", "1"], "argument --acip-tokens: expected a whole number, at least 2, found 1"),
        ([*SCORE, "--acip-tuning", "-1"], "argument --acip-tuning: expected a whole number, at least 0, found -1"),
        ([*SCORE, "--acip-rank", "0"], "argument --acip-rank: expected a whole number, at least 1, found 0"),
        ([*SCORE, "--acip-rate", "inf"], "argument --acip-rate: expected a finite number above 0, found inf"),
        ([*SCORE, "--acip-stop", "1"], "argument --acip-stop: expected a finite number above 0 and below 1, found 1.0"),
        (
            [*BUILD, "--polish", "nan"],
            "argument --polish: expected a finite number above 0 and at most 1440, found nan",
        ),
        (
            [*BUILD, "--polish", "-1"],
            "argument --polish: expected a finite number above 0 and at most 1440, found -1.0",
        ),
        (
            [*BUILD, "--polish", "1441"],
            "argument --polish: expected a finite number above 0 and at most 1440, found 1441.0",
        ),
        (
            [*BUILD, "--polish", "soon"],
            "argument --polish: expected a finite number above 0 and at most 1440, found 'soon'",
        ),
    ],
)
def test_a_usage_error_says_what_is_allowed(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: packager ")
    assert shown.err.splitlines()[-1] == f"packager: {message}"
    assert main([*words, "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": "UsageError", "message": message}


def test_allowed_numbers_pass() -> None:
    parsed = parse([*SCORE, "--seed", str(LARGEST), "--tokens", "1", "--device", "cuda:3", "--acip-tuning", "0"])
    assert (parsed.seed, parsed.tokens, parsed.device, parsed.acip_tuning) == (LARGEST, 1, "cuda:3", 0)
    assert parse([*PLAN, "--context", "auto"]).context == "auto"
    assert parse([*PLAN, "--context", "33"]).context == 33
    assert parse([*BUILD, "--polish"]).polish == 10.0
    assert parse(["curve", "m", "--measure"]).measure == 8
    with pytest.raises(UsageError):
        parse(["curve"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert "examples:\n  packager " in capsys.readouterr().out


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "packager", *words],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )


def test_the_package_is_the_command() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"packager {packager.__version__}\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_of_another_encoding_is_no_traceback(encoding: str, tmp_path: Path) -> None:
    profile = tmp_path / "kastchen.toml"
    shown = packager.load_profile("laptop-16gb").toml.replace("Laptop", "█ Kästchen")
    profile.write_text(shown, encoding="utf-8")
    done = command("profiles", "show", str(profile), PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = "? Kästchen" if encoding == "cp1252" else "? K?stchen"
    assert expected in done.stdout.decode(encoding)
    done = command("profiles", "show", str(profile), "--json", PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert json.loads(done.stdout)["description"].startswith("█ Kästchen")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "packager", "profiles"],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
