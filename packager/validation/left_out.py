"""Checks that this environment cannot make: what is missing, and the row of a report that says so."""

from __future__ import annotations

from packager.errors import MissingExtraError, require_extra
from packager.validation.report import Check

_LIBRARIES = ("torch", "transformers")


def missing_reference() -> MissingExtraError | None:
    """Why no reference in torch can be made here; None where it can."""
    try:
        require_extra("score", _LIBRARIES, "a reference in PyTorch")
    except MissingExtraError as missing:
        return missing
    return None


def left_out(name: str, missing: MissingExtraError) -> Check:
    """The row of a check that was not made."""
    return Check(
        name=name,
        value=f"left out: {missing.library} is not installed ({missing.command})",
        limit=None,
        unit="",
        passed=None,
    )
