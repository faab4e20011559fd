"""What a killed process left is known by its name, and what a living one makes is let be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from packager.io import leftovers
from packager.io.leftovers import owned, scratch_folder, sweep


def dead() -> str:
    """The mark of a process that was here and is gone."""
    code = "from packager.io.leftovers import owned; print(owned(''))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_only_what_dead_processes_of_this_host_left_is_removed(tmp_path: Path) -> None:
    pid, started, host, _ = owned("").split("-")
    gone = dead()
    for name in (
        f"x-{gone}a",
        f"x-{pid}-{int(started) + 1}-{host}-reused",
        f"x-{pid}-{started}-{host}-mine",
        "x-999999999-1-00000000-elsewhere",
        "x-unowned",
        f"y-{gone}a",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f"x-{gone}file").touch()
    (tmp_path / f"x-{gone}link").symlink_to(tmp_path / "x-unowned")
    sweep(tmp_path, "x-")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        f"x-{pid}-{started}-{host}-mine",
        "x-999999999-1-00000000-elsewhere",
        "x-unowned",
        f"y-{gone}a",
    }
    assert (tmp_path / "x-unowned" / "file").is_file()
    sweep(tmp_path, "x-", locked=True)
    assert {path.name for path in tmp_path.iterdir()} == {f"x-{pid}-{started}-{host}-mine", f"y-{gone}a"}
    sweep(tmp_path / "nowhere", "x-")


def test_a_scratch_folder_is_there_for_the_block_and_those_of_the_dead_go(tmp_path: Path) -> None:
    abandoned = tmp_path / f"packager-scratch-{dead()}x"
    abandoned.mkdir()
    with scratch_folder(tmp_path) as outer, scratch_folder(tmp_path) as inner:
        assert {path.name for path in tmp_path.iterdir()} == {outer.name, inner.name}
        (inner / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_without_proc_a_process_is_known_by_psutil_or_by_its_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read, exists = Path.read_bytes, Path.exists

    def hidden(self: Path) -> bytes:
        if str(self).startswith("/proc"):
            raise FileNotFoundError(self)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", hidden)
    monkeypatch.setattr(Path, "exists", lambda self: not str(self).startswith("/proc") and exists(self))
    assert leftovers._started(os.getpid()) > 1_600_000_000
    assert leftovers._started(999_999_999) == 0
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert leftovers._started(os.getpid()) == 1
    assert leftovers._started(999_999_999) == 0
