"""What was measured: checks with value, limit, unit and verdict; as JSON, HTML, or a table on a terminal."""

from __future__ import annotations

import contextlib
import html
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packager.bundle.folder import BundleFolder
from packager.bundle.manifest import Measured, Predicted
from packager.errors import ArtifactError
from packager.io.files import dump_json, read_json, write_text
from packager.io.records import Count, Said, from_plain, without_none
from packager.sizes import format_size

SCHEMA = 1

Value = int | float | str | None
"""What a check measured, or is held against."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One measurement against one limit. `passed` is None for what is only reported."""

    name: str
    value: Value
    limit: Value
    unit: str
    passed: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One build of the closed loop: what was planned, what was kept free beside the prediction, and the peak that was
    measured, 0 where the run failed."""

    context_tokens: Count
    cache: str
    file_bytes: Count
    loss_nats: float
    predicted_bytes: Count
    measured_bytes: Count
    reserve_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the bundle was asked at the end of the acceptance test, and what it answered."""

    prompt: Said
    text: Said


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationReport:
    """All checks of one bundle, named by hash, and how they came about. `rounds` tells of each build that led here;
    `answer` is None where the acceptance test did not finish."""

    bundle_sha256: str
    checks: tuple[Check, ...]
    enforced_by: str | None
    measured: Measured
    predicted: Predicted
    answer: Answer | None
    rounds: tuple[Round, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `report.json`."""
        plain = asdict(self) | {"measured": without_none(self.measured)}
        # An object even where there was no answer: that is how readers of the file know it.
        return {"schema": SCHEMA, "passed": self.passed} | plain | {"answer": plain["answer"] or {}}


def write_report(report: ValidationReport, root: Path) -> None:
    """`report.json` and `report.html` into the bundle in folder `root`."""
    folder = BundleFolder(root=root)
    write_text(folder.report, dump_json(report.to_dict()))
    write_text(folder.report_page, to_html(report))


def earlier_rounds(root: Path, bundle_sha256: str) -> tuple[Round, ...]:
    """The builds that led to the bundle in folder `root`, from the report that lies there; none where that is of
    another bundle or no report. What cannot be read is left out."""
    path = BundleFolder(root=root).report
    try:
        report = read_json(path)
    except ArtifactError:
        return ()
    rounds = report.get("rounds")
    if report.get("bundle_sha256") != bundle_sha256 or not isinstance(rounds, list):
        return ()
    found = []
    for item in rounds:
        with contextlib.suppress(ArtifactError):
            found.append(from_plain(Round, item, str(path)))
    return tuple(found)


def round_text(number: int, item: Round) -> str:
    """One build of the closed loop, for people."""
    measured = f"measured {format_size(item.measured_bytes)}" if item.measured_bytes else "not measured"
    return (
        f"build {number}: predicted peak {format_size(item.predicted_bytes)}, {measured}, weights "
        f"{format_size(item.file_bytes)}, context {item.context_tokens} tokens"
    )


def shown(value: Value, unit: str) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if unit == "bytes" and not isinstance(value, str):
        return f"{format_size(int(value))} ({int(value):,})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(check: Check) -> str:
    """pass, FAIL, or reported."""
    return {True: "pass", False: "FAIL", None: "reported"}[check.passed]


def to_html(report: ValidationReport) -> str:
    """A page that needs nothing else: no script, nothing fetched."""

    def cell(text: str) -> str:
        return f"<td>{html.escape(text)}</td>"

    rows = "".join(
        f"<tr class={verdict(check).lower()}>{cell(check.name)}{cell(shown(check.value, check.unit))}"
        f"{cell(shown(check.limit, check.unit))}"
        f"{cell('' if check.unit == 'bytes' else check.unit)}{cell(verdict(check))}</tr>"
        for check in report.checks
    )
    terms = report.predicted.memory.terms
    widest = max(1, *(abs(size) for size in terms.values()))
    bars = "".join(
        f"<tr>{cell(name)}{cell(format_size(size))}<td><div "
        f"style='width:{max(0, 300 * size // widest)}px'></div></td></tr>"
        for name, size in terms.items()
    )
    rounds = "".join(
        f"<li>{html.escape(round_text(number, item))}</li>" for number, item in enumerate(report.rounds, 1)
    )
    limit = (
        f"hard limit by {report.enforced_by}"
        if report.enforced_by
        else "memory limit not enforced: this system offers none"
    )
    prompt, answer = (report.answer.prompt, report.answer.text) if report.answer else ("", "")
    return f"""<!doctype html><meta charset=utf-8><title>Validation report</title>
<style>body{{font:16px system-ui;margin:2em;max-width:70em}}
td,th{{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}}
.pass td:last-child{{color:#070}}.fail td:last-child{{color:#b00;font-weight:bold}}
div{{background:#47a;height:.8em}}</style>
<h1>{"Valid" if report.passed else "NOT valid"}</h1><p>Bundle {report.bundle_sha256}; {html.escape(limit)}.</p>
<table><tr><th>check<th>value<th>limit<th>unit<th>verdict</tr>{rows}</table>
<h2>Predicted memory at the peak ({html.escape(report.predicted.memory.peak_phase)})</h2><table>{bars}</table>
<h2>Builds until it fit</h2><ul>{rounds}</ul>
<h2>What it answers</h2><p>{html.escape(prompt)}</p>
<blockquote>{html.escape(answer)}</blockquote>
"""
