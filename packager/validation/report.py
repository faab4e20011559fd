"""What was measured: checks with value, limit, unit and verdict; as JSON, HTML, or a table on a terminal."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packager.errors import ArtifactError
from packager.io.files import dump_json, read_json, write_text
from packager.sizes import format_size

SCHEMA = 1
REPORT_FILE = "report.json"
ROUND_KEYS = ("predicted_bytes", "measured_bytes", "file_bytes", "context_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One measurement against one limit. `passed` is None for what is only reported."""

    name: str
    value: Any
    limit: Any
    unit: str
    passed: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationReport:
    """All checks of one bundle, named by hash, and how they came about. `rounds` tells of each build that led here."""

    bundle_sha256: str
    checks: tuple[Check, ...]
    enforced_by: str | None
    measured: dict[str, Any]
    predicted: dict[str, Any]
    answer: dict[str, str]
    rounds: tuple[dict[str, Any], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `report.json`."""
        return {"schema": SCHEMA, "passed": self.passed} | asdict(self)


def write_report(report: ValidationReport, out: Path) -> None:
    """`report.json` and `report.html` into folder `out`."""
    write_text(out / REPORT_FILE, dump_json(report.to_dict()))
    write_text(out / "report.html", to_html(report))


def earlier_rounds(folder: Path, bundle_sha256: str) -> tuple[dict[str, Any], ...]:
    """The builds that led to the bundle in `folder`, from the report that lies there; none where that is of another
    bundle or no report."""
    try:
        report = read_json(folder / REPORT_FILE)
    except ArtifactError:
        return ()
    rounds = report.get("rounds")
    if report.get("bundle_sha256") != bundle_sha256 or not isinstance(rounds, list):
        return ()
    return tuple(
        item for item in rounds if isinstance(item, dict) and all(isinstance(item.get(key), int) for key in ROUND_KEYS)
    )


def round_text(number: int, item: dict[str, Any]) -> str:
    """One build of the closed loop, for people."""
    predicted, weights = (format_size(item[key]) for key in ("predicted_bytes", "file_bytes"))
    measured = f"measured {format_size(item['measured_bytes'])}" if item["measured_bytes"] else "not measured"
    return f"round {number}: predicted {predicted}, {measured}, weights {weights}, context {item['context_tokens']}"


def shown(value: Any, unit: str) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{format_size(value)} ({int(value):,})"
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
    terms = report.predicted["memory"]["phases"][report.predicted["memory"]["peak_phase"]]
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
    return f"""<!doctype html><meta charset=utf-8><title>Validation report</title>
<style>body{{font:16px system-ui;margin:2em;max-width:70em}}
td,th{{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}}
.pass td:last-child{{color:#070}}.fail td:last-child{{color:#b00;font-weight:bold}}
div{{background:#47a;height:.8em}}</style>
<h1>{"Valid" if report.passed else "NOT valid"}</h1><p>Bundle {report.bundle_sha256}; {html.escape(limit)}.</p>
<table><tr><th>check<th>value<th>limit<th>unit<th>verdict</tr>{rows}</table>
<h2>Predicted memory at the peak ({html.escape(report.predicted["memory"]["peak_phase"])})</h2><table>{bars}</table>
<h2>Builds until it fit</h2><ul>{rounds}</ul>
<h2>A sentence</h2><p>{html.escape(report.answer.get("prompt", ""))}</p>
<blockquote>{html.escape(report.answer.get("text", ""))}</blockquote>
"""
