"""Runs under a memory limit: what the system offers is used and tidied up, how a child ended is said."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from packager.runtime import limits
from packager.runtime.limits import LimitedRun, run_limited

GREEDY = """
import sys
print("phase: small", file=sys.stderr, flush=True)
small = bytearray(1 << 20)
print("phase: large", file=sys.stderr, flush=True)
large = bytearray(256 << 20)
print("done")
"""
limited = pytest.mark.skipif(
    run_limited(["true"], 2**30).enforced is None, reason="this system offers no memory limit to this user"
)


def run(code: str, limit: int | None, **options: float) -> LimitedRun:
    return run_limited([sys.executable, "-c", code], limit, **options)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The groups that are made during the test."""
    made: list[Path] = []
    make = limits._make_group

    def recorded(parent: Path, mechanism: str, limit_bytes: int) -> limits._Limit | None:
        found = make(parent, mechanism, limit_bytes)
        made.extend([found.group] if found and found.group else [])
        return found

    monkeypatch.setattr(limits, "_make_group", recorded)
    return made


@limited
def test_a_child_over_its_limit_is_killed_and_the_group_removed(groups: list[Path]) -> None:
    done = run(GREEDY, 96 << 20)
    assert done.killed_at_limit
    assert done.oom_killed is not False
    assert done.last_phase == "large"
    assert done.ending == f"was killed at the memory limit ({done.enforced}) in phase 'large'"
    assert done.stdout == ""
    assert not any(folder.exists() for folder in groups)


@limited
def test_a_child_within_its_limit_ends_well(groups: list[Path]) -> None:
    done = run(GREEDY, 512 << 20)
    assert (done.returncode, done.stdout, done.killed_at_limit, done.timed_out) == (0, "done\n", False, False)
    assert done.enforced
    assert done.oom_killed is not True
    assert done.charged_bytes is None or 256 << 20 < done.charged_bytes <= 512 << 20
    assert not any(folder.exists() for folder in groups)


@limited
def test_a_child_killed_by_somebody_else_is_not_called_killed_at_the_limit(groups: list[Path]) -> None:
    done = run(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", 512 << 20)
    if done.oom_killed is None:
        pytest.skip("this system does not say whom a limit killed")
    assert not done.killed_at_limit
    assert done.ending == "was killed from outside (SIGKILL; the system itself may be out of memory) in phase 'start'"


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


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Put a script in the place of systemd-run, on a system where no group can be made and the scope's is
    `tmp_path`'s."""
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    monkeypatch.setattr(limits, "_own_path", lambda controller: None)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def put(script: str) -> None:
        program = tmp_path / "systemd-run"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return put


# What systemd-run does with its options: drop them, and become the command.
BECOME = 'while [ "$1" != sh ] && [ "$1" != "$PYTHON" ]; do shift; done; '


def test_a_user_session_that_refuses_offers_nothing(systemd: Callable[[str], None]) -> None:
    systemd("exit 1")
    assert run("print('done')", 96 << 20).enforced is None


def test_a_user_session_that_does_not_answer_offers_nothing(
    systemd: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_PROBE_SECONDS", 0.2)
    systemd("exec sleep 5")
    assert run("print('done')", 96 << 20).enforced is None


@pytest.mark.parametrize(
    ("found", "enforced"),
    [("100663296", "systemd scope"), ("100659200", "systemd scope"), ("max", None), ("1073741824", None), ("", None)],
)
def test_a_scope_counts_only_where_the_limit_is_in_force(
    systemd: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, found: str, enforced: str | None
) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    systemd(f'{BECOME}if [ "$1" = sh ]; then echo {found}; exit 0; fi; exec "$@"')
    done = run("print('done')", 96 << 20)
    assert (done.returncode, done.stdout, done.enforced) == (0, "done\n", enforced)


def test_a_cgroup_of_the_second_version_is_limited_without_swap_and_asked_how_it_went(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a tree of plain files: what the kernel would do with them is not tested here."""
    (tmp_path / "own").mkdir()
    (tmp_path / "cgroup.controllers").write_text("memory")
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    monkeypatch.setattr(limits, "_own_path", lambda controller: "" if controller else "own")
    written: dict[str, str] = {}

    def kept(folder: Path | None) -> None:
        assert folder is not None
        written.update({path.name: path.read_text().strip() for path in folder.iterdir()})

    monkeypatch.setattr(limits, "_remove", kept)
    code = (
        "import os, pathlib; group = next(pathlib.Path(os.environ['TREE'], 'own').iterdir());"
        "(group / 'memory.peak').write_text('12345\\n'); (group / 'memory.events').write_text('oom 2\\noom_kill 1\\n');"
        f"print(os.getpid()); os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    monkeypatch.setenv("TREE", str(tmp_path))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    done = run(code, 96 << 20)
    assert (written["memory.max"], written["memory.swap.max"], written["cgroup.procs"]) == (
        str(96 << 20),
        "0",
        done.stdout.strip(),
    )
    assert (done.enforced, done.charged_bytes, done.oom_killed, done.killed_at_limit) == (
        "cgroup v2",
        12345,
        True,
        True,
    )


def test_swap_that_cannot_be_limited_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "_SETTINGS", {"cgroup v2": ("memory.max", "no/such/file")})
    swaps = tmp_path / "swaps"
    monkeypatch.setattr(limits, "_SWAPS", swaps)
    for text, name in (
        ("Filename Type\n", "cgroup v2"),
        ("Filename Type\n/swapfile file\n", "cgroup v2, swap not limited"),
    ):
        swaps.write_text(text)
        found = limits._make_group(tmp_path, "cgroup v2", 96 << 20)
        assert found is not None
        assert found.name == name


def test_a_child_that_takes_too_long_is_stopped_and_not_called_killed_at_the_limit() -> None:
    done = run(
        "import sys, time; print('phase: sleep', file=sys.stderr, flush=True); time.sleep(60)", None, timeout_seconds=1
    )
    assert done.timed_out
    assert not done.killed_at_limit
    assert done.ending == "took longer than 1 s and was stopped (is the machine busy?) in phase 'sleep'"


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
