"""What an install brings: pyproject names what the code imports, and what needs no extra runs without it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import packager

ROOT = Path(packager.__file__).resolve().parent
PYPROJECT = ROOT.parent / "pyproject.toml"
PROJECT = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
EXPLAINED = {
    "onnx": "only through onnx-ir",
    "accelerate": "transformers refuses to load a GGUF file without it",
}
"""What no file imports, with what the comment beside it says."""


def names(requirements: list[str]) -> set[str]:
    """The names that packages are imported by, of requirements such as "onnx-ir>=1.0,<2"."""
    return {re.split(r"[<>=!~\[ ]", requirement)[0].replace("-", "_") for requirement in requirements}


BARE = names(PROJECT["dependencies"])
SCORE, PLOT, COMPLETION = (names(PROJECT["optional-dependencies"][extra]) for extra in ("score", "plot", "completion"))


def third_party() -> set[str]:
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"packager"}


def test_every_import_is_declared_and_every_dependency_is_imported_or_explained() -> None:
    assert third_party() | set(EXPLAINED) == BARE | SCORE | PLOT | COMPLETION
    lines = PYPROJECT.read_text(encoding="utf-8").splitlines()
    for name, reason in EXPLAINED.items():
        assert any(line.strip().startswith(f'"{name}>') and f"# {reason}" in line for line in lines), name


def test_the_extras_are_these() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"score", "plot", "completion", "dev"}
    assert extras["dev"][0] == "edge-packager[score,plot,completion]"
    assert not BARE & (SCORE | PLOT | COMPLETION)
    assert {"torch", "transformers", "optimum", "tokenizers"} <= SCORE
    from packager.api.given import SCORE_LIBRARIES

    assert set(SCORE_LIBRARIES) == SCORE


def test_the_version_is_said_once() -> None:
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", packager.__version__)


def test_both_releases_of_the_runtime_are_allowed() -> None:
    assert "onnxruntime>=1.31,<1.33" in PROJECT["dependencies"]


def bare(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command line in a process that finds nothing of any extra."""
    code = (
        f"import sys\nfor name in {sorted(SCORE | PLOT)!r}: sys.modules[name] = None\n"
        "from packager.cli.command import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
        check=False,
    )


def test_what_needs_no_extra_runs_without_any(maps: Callable[[str], Path], tmp_path: Path) -> None:
    bundle, plan = tmp_path / "out.bundle", tmp_path / "plan.json"
    target = ["--profile", "laptop-16gb", "--context", 256]
    for command in (
        ["plan", maps("llama"), *target, "-o", plan],
        ["curve", maps("llama"), "--sizes", 4],
        ["curve", maps("llama"), "--sizes", 4, "--measure", 2],
        ["build", maps("llama"), *target, "-o", bundle, "--no-validate"],
        ["inspect", maps("llama")],
        ["inspect", bundle],
        ["inspect", plan],
        ["run", bundle, "--prompt", "the water", "--tokens", 3],
        ["profiles"],
        ["profiles", "show", "laptop-16gb"],
    ):
        done = bare(*command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize(
    ("arguments", "purpose"),
    [
        (["score", "demo", "-o", "x.map"], "'score'"),
        (["score", "demo", "-o", "x.map", "--method", "acip", "--acip-rank", "4"], "'score'"),
        (["pack", "demo", "--profile", "laptop-16gb", "-o", "x.bundle"], "'pack'"),
        (["profiles", "calibrate", "--base", "laptop-16gb", "-o", "x.toml"], "'profiles calibrate'"),
    ],
)
def test_a_verb_that_lacks_its_extra_says_the_command(arguments: list[str], purpose: str) -> None:
    message = (
        f'{purpose} needs torch, which is not installed: pip install "edge-packager[score]" '
        "(CPU only: pip install torch --index-url https://download.pytorch.org/whl/cpu first)"
    )
    done = bare(*arguments, "--json")
    assert (done.returncode, done.stderr) == (2, f"packager: {message}\n")
    said = json.loads(done.stdout)
    assert (said["error"], said["message"]) == ("MissingExtraError", message)


def test_a_picture_without_its_extra_says_the_command(maps: Callable[[str], Path]) -> None:
    done = bare("curve", maps("llama"), "-o", "x.svg")
    assert (done.returncode, done.stderr) == (
        2,
        'packager: drawing x.svg needs matplotlib, which is not installed: pip install "edge-packager[plot]"\n',
    )
