"""The command line itself: usage errors, how it ends, and terminals that know few letters."""

from __future__ import annotations

import errno
import json
import os
import shutil
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
        (
            [*RUN, "--temperature", "-1"],
            "argument --temperature: expected a finite number, at least 0 and at most 100, found -1.0",
        ),
        ([*RUN, "--top-p", "0"], "argument --top-p: expected a finite number above 0 and at most 1, found 0.0"),
        ([*RUN, "--top-k", "-1"], f"argument --top-k: expected a whole number from 0 to {2**31 - 1}, found -1"),
        (["curve", ""], "argument MAP: expected a path, found ''"),
        ([*PLAN, "-q", "-v"], "argument -v/--verbose: not allowed with argument -q/--quiet"),
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*RUN, "--chat"], "--chat: not together with --prompt"),
        (["run", "b", "--chat", "--raw"], "--chat: not together with --raw"),
        ([*RUN, "--raw", "--system", "x"], "system: a raw prompt has no system line: put it into the prompt"),
        (
            [*RUN, "--seed", "1"],
            "seed: at temperature 0 the likeliest token is always taken: set a temperature too, or leave it out",
        ),
    ],
)
def test_flags_that_do_not_go_together(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"packager: {message}\n"


def test_a_name_that_is_not_there_is_answered_with_those_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, marker in (("smol.map", "scoremap.safetensors"), ("smol.bundle", "packager.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).touch()
    (tmp_path / "smol.mpb").touch()
    mistyped, known = tmp_path / "smol.mpa", tmp_path / "smol.map"
    for verb in (["plan", "--profile", "laptop-16gb"], ["curve"]):
        assert main([*verb, str(mistyped)]) == 1
        assert capsys.readouterr().err == f"packager: there is no score map '{mistyped}': did you mean {known}?\n"
    assert main(["run", str(tmp_path / "smol.bundel"), "--prompt", "x"]) == 1
    assert capsys.readouterr().err.endswith(f"did you mean {tmp_path / 'smol.bundle'}?\n")
    assert main(["inspect", str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err == f"packager: there is no score map, plan or bundle '{tmp_path / 'other'}'\n"
    assert main(["inspect", str(tmp_path / "missing" / "x.map")]) == 1
    assert "cannot be found" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / ("x" * 300))]) == 1
    assert "File name too long" in capsys.readouterr().err


def test_what_nobody_expected_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("odd\nthing")

    monkeypatch.delenv("PACKAGER_DEBUG", raising=False)
    monkeypatch.setattr(packager, "inspect", broken)
    assert main(["inspect", "x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("packager: internal error (ValueError: odd thing): please report it with ")
    assert said.count("\n") == 1
    assert main(["inspect", "x", "-v", "--json"]) == 1
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert json.loads(shown.out)["error"] == "InternalError"
    monkeypatch.setenv("PACKAGER_DEBUG", "1")
    with pytest.raises(ValueError, match="odd"):
        main(["inspect", "x"])


def test_a_folder_that_is_missing_is_not_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, advised in ((errno.ENOENT, False), (errno.ENOSPC, True)):
        error = OSError(number, os.strerror(number), "x/y")
        monkeypatch.setattr(packager, "inspect", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert main(["inspect", "x"]) == 1
        assert ("free some space" in capsys.readouterr().err) is advised


def test_verbose_says_versions_before_and_after_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-v", "profiles"], ["profiles", "-v"]):
        assert main(words) == 0
        assert f"packager {packager.__version__}, Python 3." in capsys.readouterr().err


def test_a_prompt_comes_from_standard_input() -> None:
    for words, given, message in (
        (("--prompt", "-"), b"", "standard input is empty: expected a prompt"),
        ((), b"\xff", "standard input is not UTF-8 text: byte 0 is 0xff"),
        ((), b"x", "there is no bundle 'no.bundle'"),
    ):
        done = command("run", "no.bundle", *words, given=given)
        assert (done.returncode, done.stderr.decode()) == (1 if given == b"x" else 2, f"packager: {message}\n")


def test_settings_of_acip_are_shown_where_they_matter(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, shown in (("score", True), ("pack", False)):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert ("--acip-steps" in capsys.readouterr().out) is shown
    assert parse(["pack", "m", "--profile", "p", "-o", "o", "--acip-steps", "3"]).acip_steps == 3


def test_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from packager.api.threads import let_threads_sleep

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "100")
    let_threads_sleep()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_s_completion_knows_the_verbs(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", shell])
    assert stopped.value.code == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)
    assert "--kv-cache" in script
    if shell == "bash" and (bash := shutil.which("bash")):
        asked = "COMP_WORDS=(packager pl); COMP_CWORD=1; _shtab_packager; echo ${COMPREPLY[@]}"
        done = subprocess.run([bash, "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True)
        assert done.stdout == "plan\n"


def test_completion_without_its_library_says_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--print-completion", "bash"]) == 2
    assert 'pip install "edge-packager[completion]"' in capsys.readouterr().err


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


def command(*words: str, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "packager", *words],
        input=given,
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
