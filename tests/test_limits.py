"""Runs under a memory limit: what the system offers is used and tidied up, how a child ended is said."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from packager import limits
from packager.limits import LimitedRun, run_limited

GREEDY = """
import sys
print("phase: small", file=sys.stderr, flush=True)
small = bytearray(1 << 20)
print("phase: large", file=sys.stderr, flush=True)
large = bytearray(256 << 20)
print("done")
"""
limited = pytest.mark.skipif(run_limited(["true"], 2**30).enforced is None, reason="this system offers no memory limit to this user")


def run(code: str, limit: int | None, **options: float) -> LimitedRun:
    return run_limited([sys.executable, "-c", code], limit, **options)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The groups that are made during the test."""
    made: list[Path] = []
    make = limits._make_group

    def recorded(parent: Path, settings: dict[str, str], *, needed: str) -> Path | None:
        folder = make(parent, settings, needed=needed)
        made.extend([folder] if folder else [])
        return folder

    monkeypatch.setattr(limits, "_make_group", recorded)
    return made


@limited
def test_a_child_over_its_limit_is_killed_and_the_group_removed(groups: list[Path]) -> None:
    done = run(GREEDY, 96 << 20)
    assert done.killed_at_limit
    assert done.last_phase == "large"
    assert done.ending == f"was killed at the memory limit ({done.enforced}) in phase 'large'"
    assert done.stdout == ""
    assert not any(folder.exists() for folder in groups)


@limited
def test_a_child_within_its_limit_ends_well(groups: list[Path]) -> None:
    done = run(GREEDY, 512 << 20)
    assert (done.returncode, done.stdout, done.killed_at_limit, done.timed_out) == (0, "done\n", False, False)
    assert done.enforced
    assert not any(folder.exists() for folder in groups)


def test_without_a_limit_nothing_is_enforced() -> None:
    done = run(GREEDY, None)
    assert (done.returncode, done.enforced) == (0, None)


def test_without_cgroups_nothing_is_enforced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    done = run(GREEDY, 96 << 20)
    assert (done.returncode, done.enforced, done.killed_at_limit) == (0, None, False)


def test_a_group_that_admits_nobody_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """cgroup.procs of a made-up group is not writable: it is a folder."""
    root = tmp_path / "cgroup"
    parent = root / "memory" / (limits._own_path("memory") or "")
    parent.mkdir(parents=True)
    made = limits.tempfile.mkdtemp

    def with_folder(**named: str) -> str:
        folder = made(**named)
        Path(folder, "cgroup.procs").mkdir()
        return folder

    monkeypatch.setattr(limits, "_ROOT", root)
    monkeypatch.setattr(limits, "_own_path", lambda controller: "" if controller == "memory" else None)
    monkeypatch.setattr(limits.tempfile, "mkdtemp", with_folder)
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    done = run("print('done')", 96 << 20)
    assert (done.returncode, done.stdout, done.enforced) == (0, "done\n", None)


def test_a_user_session_that_does_not_answer_offers_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "systemd-run"
    slow.write_text("#!/bin/sh\nexit 1\n")
    slow.chmod(0o755)
    monkeypatch.setattr(limits, "_ROOT", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert run("print('done')", 96 << 20).enforced is None


def test_a_child_that_takes_too_long_is_stopped_and_not_called_killed_at_the_limit() -> None:
    done = run("import sys, time; print('phase: sleep', file=sys.stderr, flush=True); time.sleep(60)", None, timeout_seconds=1)
    assert done.timed_out
    assert not done.killed_at_limit
    assert done.ending == "was stopped, it took too long, in phase 'sleep'"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.kill(os.getpid(), 11)", "crashed (SIGSEGV) in phase 'start'"),
        ("import os; os.abort()", "crashed (SIGABRT) in phase 'start'"),
        ("raise SystemExit('phase of the moon')", "ended with status 1 in phase 'start': phase of the moon"),
        (
            f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})",
            "was killed from outside (SIGKILL; the system itself may be out of memory) in phase 'start'",
        ),
    ],
)
def test_how_it_ended(code: str, expected: str) -> None:
    assert run(code, None).ending == expected
