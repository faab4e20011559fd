"""Scoring that is killed goes on where it was: the same map, and nothing that was finished is done again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico

import packager.scoring.acip.options
import packager.scoring.curvature.method
import packager.scoring.curvature.options
import packager.scoring.score
from packager.progress import Silent
from packager.scoremap.identity import read_identity
from packager.scoremap.model import read_map
from packager.scoremap.settings import QUICK_ACIP, ScoreSettings
from packager.scoring.correction import QUICK_ANCHOR_NATS
from packager.scoring.ledger import Ledger
from packager.scoring.method import labels_tried
from packager.scoring.probes import Observer, anchor_prefixes
from packager.scoring.score import method_of, score_model
from packager.source.checkpoint import open_checkpoint

SETTINGS = ScoreSettings(tokens=2048, quick=True)
# Scores in a process of its own, which kills itself as the interpreter reports an operation on a certain file for the
# n-th time: just before a finished file gets its name is the worst moment for it.
CHILD = """
import os, signal, sys
operation, name, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
def watch(event, arguments):
    global left
    if event == operation and name in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from packager.cli.command import main
sys.exit(main(sys.argv[4:]))
"""
ALL, ALL_BUT_ONE = -1, -2


def counted_off(number: int, total: int) -> int:
    """`number`, counted from the end where it is negative."""
    return number if number >= 0 else total + 1 + number


def unit_files(work: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished unit's file: a file made again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in work.glob("unit-*.safetensors")}


class Watcher(Silent):
    """Looks at the work folder as the map begins to be written."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.files: dict[str, tuple[int, int]] = {}

    def phase(self, name: str, total: int) -> None:
        if name == "writing the map":
            self.files = unit_files(self.work)


@pytest.mark.parametrize(
    ("operation", "name", "count", "curvature", "units", "measured"),
    [
        pytest.param("os.rename", "curvature-0.writing", 1, False, 0, 0, id="curvature nearly finished"),
        pytest.param("os.rename", "/unit-", 1, True, 0, 0, id="no unit finished"),
        pytest.param("os.rename", "/unit-", 8, True, 7, 0, id="half of the units"),
        pytest.param("os.rename", ".measured.json.", 4, False, ALL, 3, id="some probes"),
        pytest.param("os.rename", ".measured.json.", ALL, False, ALL, ALL_BUT_ONE, id="all but one anchor"),
        pytest.param("shutil.copytree", "/skeleton", 1, False, ALL, ALL, id="map half written"),
        pytest.param("os.rename", ".out.map.staging-", 1, False, ALL, ALL, id="map written under no name yet"),
    ],
)
def test_a_killed_run_is_resumed_and_nothing_is_done_twice(
    operation: str,
    name: str,
    count: int,
    curvature: bool,
    units: int,
    measured: int,
    picos: Callable[[str], Pico],
    maps: Callable[[str], Path],
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = read_map(maps("llama"))
    every = {
        "unit": len(whole.units),
        "measured": len(read_identity(maps("llama")).probes) + len(anchor_prefixes(whole, QUICK_ANCHOR_NATS)) + 1,
    }  # the cache
    units, measured, count = (
        counted_off(number, every[what])
        for number, what in ((units, "unit"), (measured, "measured"), (count, "measured"))
    )
    out, work = tmp_path / "out.map", tmp_path / ".out.map.work"
    command = [
        "score",
        str(picos("llama").folder),
        "-o",
        str(out),
        "--calibration",
        str(calibration_text),
        "--tokens",
        "2048",
        "--quick",
    ]
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, operation, name, str(count), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert (work / "curvature-0.safetensors").is_file() is curvature
    before = unit_files(work)
    assert len(before) == units
    ledger = work / "measured.json"
    assert (len(json.loads(ledger.read_text())) if ledger.is_file() else 0) == measured

    calls = {"curvature": 0, "unit": 0, "measured": 0}

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[what] += 1
            return function(*arguments, **named)

        return call

    method = packager.scoring.curvature.method
    monkeypatch.setattr(method, "collect", counted("curvature", method.collect))
    monkeypatch.setattr(method, "score_unit", counted("unit", method.score_unit))
    monkeypatch.setattr(Observer, "measure", counted("measured", Observer.measure))
    watcher = Watcher(work)
    score_model(
        open_checkpoint(str(picos("llama").folder)),
        out,
        SETTINGS,
        calibration_paths=[calibration_text],
        progress=watcher,
    )
    again = units < every["unit"] and not curvature
    assert calls == {"curvature": int(again), "unit": every["unit"] - units, "measured": every["measured"] - measured}
    assert before.items() <= watcher.files.items()
    assert [path.name for path in tmp_path.iterdir()] == ["out.map"]
    for file in ("scoremap.safetensors", "store.safetensors", "map.json"):
        assert (out / file).read_bytes() == (maps("llama") / file).read_bytes(), file


@pytest.mark.parametrize("change", ["nothing", "packager", "torch", "forms"])
def test_work_of_another_version_or_set_of_forms_is_not_gone_on_with(
    change: str, picos: Callable[[str], Pico], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        """Scoring came as far as the skeleton."""

    def stop(*arguments: object) -> None:
        raise StoppedError

    monkeypatch.setattr(packager.scoring.score, "export_skeleton", stop)

    def begin() -> None:
        with pytest.raises(StoppedError):
            score_model(
                open_checkpoint(str(picos("llama").folder)),
                tmp_path / "out.map",
                SETTINGS,
                calibration_paths=[calibration_text],
                progress=Silent(),
            )

    begin()
    finished = tmp_path / ".out.map.work" / "unit-one.safetensors"
    finished.touch()
    if change == "packager":
        monkeypatch.setattr(packager.scoring.score, "__version__", "0.0.9")
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "99.1.0")
    elif change == "forms":
        monkeypatch.setattr(packager.scoring.curvature.options, "QUICK_LINEAR_FORMS", ("q8g64", "q4g64z"))
    begin()
    assert finished.exists() is (change == "nothing")


@pytest.mark.parametrize("float_only", [False, True])
def test_the_labels_tell_when_acip_tries_other_forms(float_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(ScoreSettings(acip=QUICK_ACIP, float_only=float_only))
    before = labels_tried(method)
    assert len(before) == len(set(before))
    monkeypatch.setattr(packager.scoring.acip.options, "_SHARES", (0.25, 0.5))
    assert labels_tried(method) != before


def test_a_ledger_measures_once(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    values = iter([(0.1, 1 / 3), (3e-17, -2.5)])
    ledger = Ledger(path)
    assert ledger.recall("a", lambda: next(values)) == (0.1, 1 / 3)
    assert ledger.recall("a", lambda: next(values)) == (0.1, 1 / 3)
    assert ledger.recall("b", lambda: next(values)) == (3e-17, -2.5)

    def never() -> tuple[float, float]:
        raise AssertionError("measured again")

    assert Ledger(path).recall("a", never) == (0.1, 1 / 3)
    assert Ledger(path).recall("b", never) == (3e-17, -2.5)


def test_a_measurement_that_fails_leaves_the_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    Ledger(path).recall("a", lambda: (1.0, 2.0))

    def fail() -> tuple[float, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ledger(path).recall("b", fail)
    assert json.loads(path.read_text()) == {"a": [1.0, 2.0]}
    assert [path.name for path in tmp_path.iterdir()] == ["measured.json"]
