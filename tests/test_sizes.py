"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import UsageError
from packager.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1500000", 1_500_000),
        ("1.5GiB", 3 * 2**29),
        ("700 MB", 700_000_000),
        (" 224mib ", 224 * 2**20),
        (".5G", 2**29),
        ("1b", 1),
        ("2k", 2048),
        ("3tb", 3 * 10**12),
        ("1TiB", 2**40),
        ("1T", 2**40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "12 parsecs",
        "",
        " ",
        "GiB",
        "-1GiB",
        "1,5GiB",
        "1.GiB",
        "1e9",
        "0x10",
        "1 2",
        "½GiB",
        "١٢",
        "nan",
        "inf",
        "1.5.2MB",
        "60 percent",
        "%",
        "-5%",
        "1GiBB",
        "9" * 400,
    ],
)
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, of_bytes=1000)
    assert (
        str(caught.value)
        == f"{text!r} is not a size: expected bytes, a unit such as 700MB or 1.5GiB, or a share such as 60%"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0MB", "0.5", "0.9b"])
def test_nothing_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert str(caught.value) == f"{text!r} is not a size: expected more than zero bytes"


@pytest.mark.parametrize("text", ["0%", "100.1%", "1000%"])
def test_what_is_not_a_share(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, of_bytes=1000)
    assert str(caught.value) == f"{text!r} is not a share of the device's memory: expected above 0% and at most 100%"


def test_a_share_needs_a_whole() -> None:
    assert parse_size("60%", of_bytes=1000) == 600
    assert parse_size("12.5 %", of_bytes=1000) == 125
    assert parse_size("100%", of_bytes=1000) == 1000
    with pytest.raises(UsageError) as caught:
        parse_size("60%")
    assert str(caught.value) == "'60%' is a share, and there is no device memory to take it of: give bytes"


def test_a_share_of_less_than_a_byte_is_not_a_size() -> None:
    with pytest.raises(UsageError) as caught:
        parse_size("0.1%", of_bytes=100)
    assert str(caught.value) == "'0.1%' is not a size: expected more than zero bytes"


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        size = parse_size(text, of_bytes=10**9)
    except UsageError:
        return
    assert size > 0


@given(st.integers(1, 2**50))
def test_plain_bytes_are_themselves(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (224 * 2**20, "224 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (-3_355_443, "-3.2 MiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_formats(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(2**10, 2**49))
def test_formatted_sizes_are_near(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.051 * size
