"""Where torch and its kin are not installed: plan, build, validate, run, inspect and curve work, and say what they
leave out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from packager.errors import MissingExtraError

ABSENT = (
    "torch",
    "transformers",
    "accelerate",
    "optimum",
    "gguf",
    "huggingface_hub",
    "pyarrow",
    "onnxscript",
    "tokenizers",
)
BLOCKED = f"""\
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        absent = name.partition(".")[0] in {ABSENT!r}
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from packager.cli.command import main
sys.exit(main(sys.argv[1:]))
"""
MISSING = MissingExtraError("measuring on a text of your own", library="torch", extra="score")
LEFT_OUT = f"left out: torch is not installed ({MISSING.command})"
PROFILE = """\
[device]
memory = "1GiB"
budget = "50%"
threads = 1

[runtime]
chunk_tokens = 32

[context]
tokens = 128
"""


def bare(*arguments: object) -> subprocess.CompletedProcess[str]:
    """One command line in a process that has none of ABSENT."""
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def succeed(*arguments: object) -> str:
    done = bare(*arguments)
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "pico-box.toml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, maps: Callable[[str], Path], profile: Path) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "llama.bundle"
    succeed("build", maps("llama"), "--profile", profile, "-o", out, "--no-validate")
    return out


def test_plans_are_made_and_artefacts_inspected(maps: Callable[[str], Path], profile: Path, bundle: Path) -> None:
    assert json.loads(succeed("plan", maps("llama"), "--profile", profile, "--json"))["profile"] == "pico-box"
    assert json.loads(succeed("inspect", maps("llama"), "--json"))["kind"] == "score map"
    assert json.loads(succeed("inspect", bundle, "--json"))["kind"] == "bundle"


def test_a_bundle_runs(bundle: Path) -> None:
    succeed("run", bundle, "--prompt", "The first people", "--tokens", 4)


def test_validation_checks_what_it_can_and_says_what_it_left_out(bundle: Path) -> None:
    report = json.loads(succeed("validate", bundle, "--json"))
    checks = {check["name"]: check for check in report["checks"]}
    absent = {name for name, check in checks.items() if check["value"] == LEFT_OUT}
    assert absent == {
        "tokenizer against the source model's",
        "next-token logits and greedy tokens against PyTorch",
        "divergence at the end of a full context",
        "largest logit difference between ONNX Runtime (float kernels) and PyTorch, same weights",
        "held-out loss of the same weights in PyTorch",
        "loss that ONNX Runtime adds to the same weights in PyTorch",
    }
    assert all(checks[name]["passed"] is None for name in absent)
    assert checks["files whose size or SHA-256 is not the manifest's"]["passed"] is True
    assert checks["peak resident memory of the process"]["passed"] is True
    measured = report["measured"]
    assert measured["loss_nats"] == pytest.approx(
        checks["held-out loss of the bundle on ONNX Runtime"]["value"]
        - checks["held-out loss of the source model"]["value"]
    )
    assert "torch_heldout_nats" not in measured


def test_a_build_is_validated_as_far_as_it_goes(maps: Callable[[str], Path], profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bundle"
    report = json.loads(succeed("build", maps("llama"), "--profile", profile, "-o", out, "--json"))["report"]
    assert report["passed"] is True
    assert LEFT_OUT in [check["value"] for check in report["checks"]]
    assert not (out / "golden.safetensors").exists()


def test_curves_are_predicted_and_measured_on_held_out_text(maps: Callable[[str], Path]) -> None:
    found = json.loads(succeed("curve", maps("taught"), "--sizes", 3, "--measure", 2, "--json"))
    assert len([point for point in found["points"] if point["measured"]]) == 2


def test_a_text_of_one_s_own_needs_the_extra(maps: Callable[[str], Path], calibration_text: Path) -> None:
    done = bare("curve", maps("llama"), "--sizes", 3, "--text", calibration_text)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"packager: {MISSING}"
