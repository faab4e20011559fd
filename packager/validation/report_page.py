"""`report.html`: one page that needs nothing else, no script, nothing fetched; for a desk, a phone, the dark, paper."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from packager import __version__
from packager.bundle.folder import BundleFolder
from packager.bundle.manifest import Manifest, parse_manifest
from packager.io.files import dump_json, read_json, write_text
from packager.sizes import format_size
from packager.validation.advice import columns, size_or_dash, verdict_lines
from packager.validation.report import ValidationReport, round_text, verdict

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--page:#fff;--panel:#f6f8fa;
--good:#116329;--bad:#b3261e;--bar:#2f6fb5;--over:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa5b1;--line:#30363d;--page:#0d1117;--panel:#161b22;
--good:#5bd47f;--bad:#ff8a80;--bar:#6cb0f5;--over:#ff8a80}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;padding:1.25rem;
max-width:62rem;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .5rem}p,ul{margin:.25rem 0}
header{border-left:.4rem solid;padding:.1rem 0 .1rem 1rem}header.good{border-color:var(--good)}
header.bad{border-color:var(--bad)}.good h1,.pass b{color:var(--good)}.bad h1,.fail b{color:var(--bad)}
.soft,.reported b{color:var(--soft);font-weight:normal}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.2rem,1fr));gap:.75rem;margin:1.25rem 0 0}
dl div{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .75rem}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}dd.soft{font-size:.85rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .75rem .35rem 0;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:normal;font-size:.85rem}tbody th{font-weight:normal}
td{font-variant-numeric:tabular-nums}.checks td:nth-child(n+3){white-space:nowrap}
.bars td:nth-child(2){white-space:nowrap;text-align:right}.bars td:last-child{width:45%;padding-right:0}
.bar{display:block;height:.8rem;border-radius:.15rem;background:var(--bar);
print-color-adjust:exact;-webkit-print-color-adjust:exact}
pre,blockquote{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;margin:.5rem 0;
padding:.6rem .9rem;white-space:pre-wrap}
footer{margin-top:2.5rem;color:var(--soft);font-size:.85rem}
@media(max-width:40rem){.checks thead{display:none}.checks tr{display:block;border-bottom:1px solid var(--line);
padding:.5rem 0}.checks th,.checks td{display:block;border:0;padding:0}
.checks td[data-is]::before{content:attr(data-is) " ";color:var(--soft)}}
@media print{body{max-width:none;padding:0;font-size:11pt}tr,dl div{break-inside:avoid}h2{break-after:avoid}}
"""


def write_report(report: ValidationReport, root: Path) -> None:
    """`report.json` and `report.html` into the bundle in folder `root`, whose manifest is there."""
    folder = BundleFolder(root=root)
    manifest = parse_manifest(read_json(folder.manifest), str(folder.manifest))
    write_text(folder.report, dump_json(report.to_dict()))
    write_text(folder.report_page, report_page(report, manifest))


def report_page(report: ValidationReport, manifest: Manifest) -> str:
    """The page of one report, of the bundle that `manifest` is of: verdict first, then figures, checks, memory,
    builds, an answer."""
    name, first, *rest = _text(manifest.model.name), *verdict_lines(report)
    causes = "".join(f"<p>{_text(line)}</p>" for line in rest)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} for {_text(manifest.profile)}: {_text(first)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header class="{"good" if report.passed else "bad"}">
<h1>{_text(first)}</h1>
<p><strong>{name}</strong> for <strong>{_text(manifest.profile)}</strong>, {_text(_limit(report))}</p>
{causes}
</header>
<main>
{_figures(report, manifest)}
<h2>Checks</h2>
{_checks(report)}
<h2>Memory at the predicted peak, in {_text(report.predicted.memory.peak_phase)}</h2>
{_bars(report, manifest)}
{_builds(report)}
{_answer(report)}
<h2>How to run it</h2>
<pre>packager run BUNDLE --prompt "…"
python check.py</pre>
</main>
<footer>
<p>Bundle {_text(report.bundle_sha256)}</p>
<p>Exact numbers are in report.json. Written by edge-packager {_text(__version__)}.</p>
</footer>
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _limit(report: ValidationReport) -> str:
    if report.enforced_by:
        return f"tested under a hard memory limit ({report.enforced_by})"
    return "tested without a memory limit: this system offers none to this user"


def _figures(report: ValidationReport, manifest: Manifest) -> str:
    """What was measured, with what was promised below it."""
    measured, predicted, bounds = report.measured, report.predicted, manifest.bounds
    rise = "–" if measured.loss_nats is None else f"{measured.loss_nats:+.4f}"
    figures = [
        ("Memory budget", format_size(bounds.budget_bytes), f"for {bounds.context_tokens:,} tokens"),
        ("Peak memory", size_or_dash(measured.peak_bytes), f"{format_size(predicted.peak_bytes)} predicted"),
        ("Rise of the loss, nats per token", rise, f"{predicted.loss_nats:+.4f} predicted"),
        ("Weights", format_size(predicted.file_bytes), f"{manifest.cache} key/value cache"),
    ]
    speeds = (
        ("Reading a prompt", measured.prefill_tokens_per_second),
        ("Answering", measured.decode_tokens_per_second),
    )
    figures += [(name, f"{speed:.0f} tokens/s", "on the machine that tested") for name, speed in speeds if speed]
    items = _join(
        f'<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd><dd class="soft">{_text(note)}</dd></div>'
        for name, value, note in figures
    )
    return f"<dl>{items}</dl>"


def _checks(report: ValidationReport) -> str:
    rows = []
    for check in report.checks:
        value, limit = columns(check)
        held = f'<td data-is="allowed">{_text(limit)}</td>' if check.limit is not None else "<td></td>"
        said = verdict(check)
        rows.append(
            f'<tr class="{said.lower()}"><th scope="row">{_text(check.name)}</th><td data-is="measured">{_text(value)}'
            f"</td>{held}<td><b>{_text(said)}</b></td></tr>"
        )
    head = _join(f'<th scope="col">{name}</th>' for name in ("check", "measured", "allowed", "verdict"))
    return f'<table class="checks"><thead><tr>{head}</tr></thead><tbody>{_join(rows)}</tbody></table>'


def _bars(report: ValidationReport, manifest: Manifest) -> str:
    """The terms of the predicted peak, and what is left of the budget, as shares of the larger of both."""
    terms = report.predicted.memory.terms
    budget, peak = manifest.bounds.budget_bytes, report.predicted.peak_bytes
    whole = max(1, budget, peak)
    rows = [
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(format_size(size))}</td><td>'
        f'<span class="bar" style="width:{max(0.0, min(1.0, size / whole)):.1%}"></span></td></tr>'
        for name, size in sorted(terms.items(), key=lambda term: -term[1])
        if size
    ]
    left = budget - peak
    said = "left of the budget" if left >= 0 else "beyond the budget"
    rows.append(f'<tr><th scope="row">{said}</th><td>{_text(format_size(abs(left)))}</td><td></td></tr>')
    return f'<table class="bars"><tbody>{_join(rows)}</tbody></table>'


def _builds(report: ValidationReport) -> str:
    if not report.rounds:
        return ""
    items = _join(f"<li>{_text(round_text(number, item))}</li>" for number, item in enumerate(report.rounds, 1))
    return f"<h2>Builds until it fit</h2><ul>{items}</ul>"


def _answer(report: ValidationReport) -> str:
    if report.answer is None:
        return ""
    return (
        f"<h2>What it answers</h2><p>{_text(report.answer.prompt)}</p>"
        f"<blockquote>{_text(report.answer.text)}</blockquote>"
    )


def _join(parts: Iterable[str]) -> str:
    return "\n".join(parts)
