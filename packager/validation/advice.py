"""What to do about a check that failed, and how a check reads."""

from __future__ import annotations

from packager.sizes import format_size
from packager.validation.report import Check, ValidationReport, shown

_TOKENS = "this runtime treats the model's tokens otherwise than its source: do not ship it, and report the model"
_BY_NAME = (
    ("SHA-256", "files were changed or damaged since: copy the bundle again, or build it again"),
    ("acceptance test", "the runtime did not run it to its end: give it a larger --budget, or a shorter --context"),
    ("tokenizer", _TOKENS),
    ("stop tokens", _TOKENS),
    ("loss", "build with a larger --budget, or score the model again with more and closer --calibration text"),
)
"""What a check's name holds, and what to do; the first that is found counts."""
_MEMORY = "build again with a smaller --budget or a shorter --context: packager build MAP --budget SIZE …"
_OTHERWISE = "the graph computes something else than the model: do not ship it, and report the model"


def next_step(check: Check) -> str:
    """What the user can do about a check that failed."""
    if check.unit == "bytes":
        return _MEMORY
    return next((step for part, step in _BY_NAME if part in check.name), _OTHERWISE)


def verdict_lines(report: ValidationReport) -> list[str]:
    """The verdict; of a bundle that is not valid also each cause, and each next step once."""
    if report.passed:
        return ["VALID"]
    failed = [check for check in report.checks if check.passed is False]
    lines = [f"NOT VALID: {len(failed)} of {len(report.checks)} checks failed"]
    for check in failed:
        value, limit = columns(check)
        lines.append(f"cause: {check.name}: {value}, allowed {limit}")
    lines += [f"next: {step}" for step in dict.fromkeys(map(next_step, failed))]
    return lines


def columns(check: Check) -> tuple[str, str]:
    """What a check measured and what it is held against, with the unit where it is said once. Bytes are exact where
    they would read alike."""
    both = [shown(item, check.unit) for item in (check.value, check.limit)]
    if both[0] == both[1] and check.value != check.limit and check.unit == "bytes":
        both = [f"{item:,} bytes" if isinstance(item, int) else str(item) for item in (check.value, check.limit)]
    unit = "" if check.unit == "bytes" or isinstance(check.value, str) else f" {check.unit}"
    return both[0] + unit, both[1]


def size_or_dash(size: int | None) -> str:
    """Bytes as people write them, or a dash where they are not known."""
    return "–" if size is None else format_size(size)
