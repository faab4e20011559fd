"""Calibration on this machine's real runtime, with models so small that it takes seconds."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest

import packager.memory.calibrate
from packager.cli.command import main
from packager.errors import RuntimeCheckError, UsageError
from packager.memory.calibrate import FITTED, HELD_OUT, ModelToMeasure, ProcessToMeasure, calibrate
from packager.profile import load_profile
from packager.progress import Silent
from packager.runtime.limits import run_limited


def shape(layers: int, vocab: int, *runs: ProcessToMeasure) -> ModelToMeasure:
    config = FITTED["deep"].config
    return ModelToMeasure(
        config={
            **config,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "vocab_size": vocab,
        },
        processes=runs,
    )


def run(form: str, chunk: int) -> ProcessToMeasure:
    return ProcessToMeasure(form=form, head=form, context_tokens=128, prompt_tokens=100, chunk_tokens=chunk)


SMALL = {
    "few": shape(1, 1024, run("q4g16", 16), run("q8g64", 64), run("f32", 32)),
    "more": shape(6, 4096, run("q4g16", 64), run("q2g32", 16), run("f32", 16)),
}
OTHER = {"held out": shape(3, 2048, run("q4g32", 32))}
small = functools.partial(calibrate, fitted=SMALL, held_out=OTHER)


def test_a_profile_is_measured_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packager.memory.calibrate, "calibrate", small)
    out = tmp_path / "here.toml"
    command = ["profiles", "calibrate", "--base", "edge-box-256mb", "-o", str(out)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    profile, base = load_profile(str(out)), load_profile("edge-box-256mb")
    assert os.listdir(tmp_path) == ["here.toml"]  # noqa: PTH208  the names are what is asked
    assert dataclasses.asdict(profile.coefficients) == found["coefficients"]
    assert dataclasses.replace(profile, name=base.name, coefficients=base.coefficients, toml=base.toml) == base
    assert profile.coefficients.measured_date > "2026"
    assert profile.coefficients.onnxruntime.count(".") == 2
    # A process is mostly base here: that much must be right.
    (trial,) = found["trials"]
    assert trial["calibrated_bytes"] == pytest.approx(trial["measured_bytes"], rel=0.05)
    assert not found["failed"]
    assert main(["profiles", "show", str(out)]) == 0
    assert profile.coefficients.provenance in capsys.readouterr().out
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err


def test_runs_that_fail_are_left_out_and_too_few_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packager.memory.calibrate, "run_limited", lambda command, limit, **options: run_limited(["false"], limit)
    )
    with pytest.raises(
        RuntimeCheckError,
        match=r"^only 0 of 6 runs ended well, 6 are needed: more, f32 .*: ended with status 1 in phase 'start'$",
    ):
        small(load_profile("edge-box-256mb"), tmp_path, Silent())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["--base", "edge-box-256mb"], ["-o", "x.toml"], ["--base", "edge-box-256mb", "-o", "x.txt"]]
)
def test_what_is_missing_is_a_usage_error(arguments: list[str]) -> None:
    assert main(["profiles", "calibrate", *arguments]) == 2


def test_accelerators_and_systems_without_proc_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("edge-box-256mb")
    with pytest.raises(UsageError, match=r"is for cuda: the coefficients are those of ONNX Runtime's CPU kernels"):
        calibrate(dataclasses.replace(profile, provider="cuda"), tmp_path, Silent())
    monkeypatch.setattr(packager.memory.calibrate, "memory", dict)
    with pytest.raises(RuntimeCheckError, match=r"no /proc/self/status"):
        calibrate(profile, tmp_path, Silent())


def test_too_few_kernels_for_a_fit_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packager.memory.calibrate, "_measure", lambda *arguments: pytest.fail("measured"))
    expected = (
        r"^profile float-only has kernels for 3 of the 15 runs that coefficients are fitted to, 6 "
        r"are needed: calibrate a profile with runtime.bits"
    )
    with pytest.raises(UsageError, match=expected):
        calibrate(load_profile("float-only"), tmp_path, Silent())


def test_kernels_that_the_device_lacks_are_not_run() -> None:
    four = dataclasses.replace(load_profile("raspberry-pi-4-4gb"), bits=(4,))
    kept = [
        item
        for shapes in (FITTED, HELD_OUT)
        for each in shapes.values()
        for item in each.processes
        if packager.memory.calibrate._settings(four, item) is not None
    ]
    assert {name for item in kept for name in (item.form[:2], item.head[:2])} == {"q4", "f3"}
