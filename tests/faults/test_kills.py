"""Whatever moment a verb is killed at: nothing half-written under a final name, no process and no control group left,
and the next run goes on.

Two moments for each signal and verb; PACKAGER_KILLS=20 tries twenty.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Pico

from packager.bundle.opening import open_bundle
from packager.planning.plan import read_plan
from packager.scoremap.opening import open_map

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not Path("/proc/self/environ").exists(), reason="needs fork and /proc"
)
KILLS = int(os.environ.get("PACKAGER_KILLS", "2"))
MARK = "PACKAGER_TEST_KILLS"
GROUPS = Path("/sys/fs/cgroup")
PATIENCE_SECONDS = 20
# Imports take longer than the work: one process does them once, and each run is a fork of it. It is told a command
# line and where to write, says the pid, and the status when that has ended.
MOTHER = """
import json, os, sys
import torch
import packager.bundle.writer, packager.scoring.score, packager.validation.measure_sizes, packager.validation.reference
import packager.validation.validate
from packager.cli.command import main
torch.set_num_threads(1)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        code = 99
        try:
            out = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = main(order["command"])
            sys.stdout.flush()
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Mother:
    """Starts runs of the command, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.log, self.temporary = folder / "log", folder / "tmp"
        self.temporary.mkdir()
        environment = os.environ | {MARK: str(os.getpid()), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", MOTHER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, command: list[str]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"command": command, "log": str(self.log)}) + "\n")
        self.process.stdin.flush()
        return self._number()

    def ended(self) -> int:
        return self._number()

    def whole(self, command: list[str]) -> float:
        """Seconds that a run takes which nobody kills; it must succeed."""
        start = time.monotonic()
        self.start(command)
        code = self.ended()
        assert code in (0, 3), self.log.read_text(encoding="utf-8")
        return time.monotonic() - start

    def relatives(self) -> set[int]:
        """Processes that come from here, but for the mother."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={os.getpid()}\0".encode() in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
        return found - {self.process.pid}

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def mother(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mother]:
    made = Mother(tmp_path_factory.mktemp("mother"))
    yield made
    made.process.communicate()


@pytest.fixture(scope="module")
def bundle(mother: Mother, maps: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "llama.bundle"
    mother.whole(["build", str(maps("llama")), "--profile", "laptop-16gb", "--no-validate", "-o", str(out)])
    return out


def groups_of(pids: set[int]) -> list[Path]:
    """Control groups that runs with these pids made."""
    return [path for pid in pids for path in GROUPS.rglob(f"packager-{pid}-*")]


def whole_or_absent(verb: str, target: Path) -> None:
    if verb.startswith("build") and target.exists():
        open_bundle(target)
    elif verb == "score" and target.exists():
        open_map(target).check_files()
    elif verb == "plan" and target.exists():
        read_plan(target)
    elif verb == "validate":
        for name in ("report.json", "report.html"):
            if (target / name).exists():
                assert (target / name).read_text(encoding="utf-8").rstrip().endswith(("}", "</blockquote>"))


@pytest.mark.parametrize("verb", ["build --no-validate", "build", "score", "plan", "validate", "curve"])
def test_killed_at_any_moment(
    verb: str,
    mother: Mother,
    bundle: Path,
    picos: Callable[[str], Pico],
    maps: Callable[[str], Path],
    calibration_text: Path,
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"
    device = ["--profile", "laptop-16gb", "--context", "256", "--budget", "1GiB"]
    match verb:
        case "build --no-validate" | "build":
            command = [*verb.split(), str(maps("llama")), *device, "-o", str(target)]
        case "score":
            text = ["--quick", "--tokens", "2048", "--calibration", str(calibration_text)]
            command = ["score", str(picos("llama").folder), *text, "-o", str(target)]
        case "plan":
            command = ["plan", str(maps("llama")), *device, "-o", str(target)]
        case "validate":
            shutil.copytree(bundle, target)
            command = ["validate", str(target)]
        case _:
            pytest.importorskip("matplotlib")
            target = tmp_path / "out.svg"
            command = ["curve", str(maps("llama")), "--measure", "2", "-o", str(target)]

    def clean_slate() -> None:
        for path in [target / "report.json", target / "report.html"] if verb == "validate" else [target]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    seconds = mother.whole(command)
    clean_slate()
    dice, pids = random.Random(verb), set()
    for number in [signal.SIGTERM, signal.SIGKILL] * KILLS:
        pid = mother.start(command)
        pids.add(pid)
        time.sleep(dice.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        code = mother.ended()
        # It may be over already, or not have begun.
        assert code in (0, 3, -number, 128 + number), mother.log.read_text(encoding="utf-8")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (left := mother.relatives()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left
        whole_or_absent(verb, target)
        if number == signal.SIGTERM:
            assert groups_of({pid}) == []
            kept = {target.name, *([".out.work"] if verb == "score" else [])}
            assert {path.name for path in tmp_path.iterdir() if f"-{pid}-" in path.name or ".lock" in path.name} <= kept
            assert not list(mother.temporary.glob(f"packager-scratch-{pid}-*"))
        if code in (0, 3):
            clean_slate()
    clean_slate()
    mother.whole(command)
    whole_or_absent(verb, target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    if verb == "validate":
        assert {path.name for path in target.iterdir()} == {path.name for path in bundle.iterdir()} | {
            "report.json",
            "report.html",
        }
    if verb in ("build", "validate"):
        assert groups_of(pids) == []
    if verb in ("validate", "curve", "score"):
        assert not list(mother.temporary.glob("packager-scratch-*"))
