"""A report beside its bundle: `report.json` for programs, `report.html` for a browser."""

from __future__ import annotations

import html
from pathlib import Path

from packager.bundle.folder import BundleFolder
from packager.io.files import dump_json, write_text
from packager.sizes import format_size
from packager.validation.advice import advice
from packager.validation.report import ValidationReport, round_text, shown, verdict


def write_report(report: ValidationReport, root: Path) -> None:
    """`report.json` and `report.html` into the bundle in folder `root`."""
    folder = BundleFolder(root=root)
    write_text(folder.report, dump_json(report.to_dict()))
    write_text(folder.report_page, to_html(report))


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
    steps = "".join(f"<p>Next: {html.escape(step)}.</p>" for step in advice(report.checks))
    return f"""<!doctype html><meta charset=utf-8><title>Validation report</title>
<style>body{{font:16px system-ui;margin:2em;max-width:70em}}
td,th{{padding:.2em .8em;text-align:left;border-bottom:1px solid #ddd}}
.pass td:last-child{{color:#070}}.fail td:last-child{{color:#b00;font-weight:bold}}
div{{background:#47a;height:.8em}}</style>
<h1>{"Valid" if report.passed else "NOT valid"}</h1><p>Bundle {report.bundle_sha256}; {html.escape(limit)}.</p>{steps}
<table><tr><th>check<th>value<th>limit<th>unit<th>verdict</tr>{rows}</table>
<h2>Predicted memory at the peak ({html.escape(report.predicted.memory.peak_phase)})</h2><table>{bars}</table>
<h2>Builds until it fit</h2><ul>{rounds}</ul>
<h2>What it answers</h2><p>{html.escape(prompt)}</p>
<blockquote>{html.escape(answer)}</blockquote>
"""
