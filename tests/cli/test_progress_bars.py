"""Progress: lines in a log, bars on a terminal, nothing where quiet was asked for."""

from __future__ import annotations

import re
import time

import pytest

from packager.cli.progress_bars import Bars, duration, rate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates() -> None:
    assert (rate(12.54), rate(1.0), rate(0.25)) == ("12.5/s", "1.0/s", "4.0 s each")


def test_a_log_has_a_line_a_phase_with_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        bars.phase("reading [the] model", 1)
        bars.advance()
        bars.phase("pricing", 300)
        bars.advance(300)
        bars.warn("it is short")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[0-9.]+ s$", "T", line) for line in lines] == [
        "reading [the] model: T",
        "packager: warning: it is short",
        "pricing: T",
    ]


def test_a_phase_that_lasts_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(log_seconds=0.05) as bars:
        bars.phase("pricing", 10)
        bars.advance(5)
        time.sleep(0.12)
        bars.phase("one step", 1)
        time.sleep(0.08)
    err = capsys.readouterr().err
    assert re.search(r"^pricing: 0\.[0-9] s so far, 50% \(5/10, [0-9.]+/s, 0\.[0-9] s left\)$", err, re.MULTILINE)
    assert re.search(r"^one step: 0\.[0-9] s so far$", err, re.MULTILINE)


def test_what_is_stopped_says_so_and_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        bars = Bars(quiet=quiet, verbose=not quiet)
        bars.phase("pricing", 10)
        bars.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        err = capsys.readouterr().err
        assert (err == "pricing: stopped after 0.0 s\nall phases: 0.0 s\n") is not quiet
        assert (err == "") is quiet


def test_bars_on_a_terminal_show_steps_rate_and_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Bars() as bars:
        bars.phase("a phase whose name is much longer than what a narrow terminal has room for", 4)
        for _ in range(4):
            bars.advance()
        bars.phase("one step", 1)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "4/4" in plain
    assert "0/1" not in plain
    assert max(map(len, plain.replace("\r", "\n").splitlines())) <= 80
