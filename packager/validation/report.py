"""What was measured: checks with value, limit, unit and verdict, and what they say of a bundle."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packager.bundle.folder import BundleFolder
from packager.bundle.manifest import Measured, Predicted
from packager.errors import ArtifactError
from packager.io.files import read_json
from packager.io.records import Count, Said, from_plain, without_none
from packager.sizes import format_size

SCHEMA = 1
_MOST_WORDS = 300

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


def number(value: float) -> Value:
    """A measured number as a report can hold it: JSON has none for what is not finite."""
    return value if math.isfinite(value) else "not a number"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is known of a bundle before it is used. `valid` is None where no report of it says; `words` are for people,
    empty where it is valid."""

    valid: bool | None
    words: str = ""


def verdict_of(root: Path) -> Verdict:
    """What the report in the bundle in folder `root` says of it. Anybody may have written it: it is told, and nothing
    rests on it."""
    folder = BundleFolder(root=root)
    validate, path = f"run 'packager validate {root}'", folder.report
    if not path.is_file():
        return Verdict(valid=None, words=f"this bundle has no report, it was never validated: {validate}")
    try:
        report = read_json(path)
        if report.get("bundle_sha256") != read_json(folder.manifest).get("bundle_sha256"):
            return Verdict(valid=None, words=f"this bundle's report is of another bundle: {validate}")
        checks = [from_plain(Check, item, str(path)) for item in report["checks"]]
        failed = [_failed_words(check) for check in checks if check.passed is False]
        passed = report["passed"]
    except (ArtifactError, KeyError, TypeError, ValueError, OverflowError):
        return Verdict(valid=None, words=f"this bundle's report cannot be read: {validate}")
    if failed or passed is not True:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        said = f": {failed[0]}{more}" if failed else ""
        return Verdict(valid=False, words=f"this bundle's report says NOT VALID{said}; for all of it {validate}")
    return Verdict(valid=True)


def _failed_words(check: Check) -> str:
    """A failed check in short, without what could steer a terminal."""
    limit = "" if check.limit is None else f" (limit {shown(check.limit, check.unit)})"
    words = f"{check.name}: {shown(check.value, check.unit)}{limit}"[:_MOST_WORDS]
    return "".join(letter if letter.isprintable() else "?" for letter in words)


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
        return format_size(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verdict(check: Check) -> str:
    """pass, FAIL, or reported."""
    return {True: "pass", False: "FAIL", None: "reported"}[check.passed]
