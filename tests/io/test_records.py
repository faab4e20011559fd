"""Plain data into records and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from packager.errors import ArtifactError
from packager.io.records import from_plain, without_none


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A value of one of several kinds, and one that may be missing."""

    value: int | float | str | None
    note: str | None = None


@pytest.mark.parametrize("value", [3, 0.5, "text", None])
def test_a_value_of_a_union_keeps_its_kind(value: Any) -> None:
    found = from_plain(Row, {"value": value}, "row").value
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", [[], True, {}])
def test_a_value_of_none_of_its_kinds_is_an_error(value: Any) -> None:
    with pytest.raises(ArtifactError, match=r"^row: value is "):
        from_plain(Row, {"value": value}, "row")


def test_what_is_none_is_left_out() -> None:
    assert without_none(Row(value=1)) == {"value": 1}
    assert without_none(Row(value=1, note="x")) == {"value": 1, "note": "x"}
