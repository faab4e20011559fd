"""Byte counts as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from packager.errors import UsageError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_MOST_SHOWN = 1 << 80
_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?|\.[0-9]{1,18})\s*([A-Za-z]*)\s*")
_SHARE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*%\s*")


def parse_size(text: str, *, of_bytes: int | None = None) -> int:
    """Bytes meant by `text`: "1500000", "1.5GiB", "700 MB", or "60%" of `of_bytes`.

    Raises UsageError when the text is not a size, is zero, or is a share where no whole is known.
    """
    if share := _SHARE.fullmatch(text):
        if of_bytes is None:
            raise UsageError(f"{text!r} is a share, and there is no device memory to take it of: give bytes")
        fraction = Fraction(share.group(1)) / 100
        if not 0 < fraction <= 1:
            raise UsageError(f"{text!r} is not a share of the device's memory: expected above 0% and at most 100%")
        size = int(fraction * of_bytes)
    else:
        match = _SIZE.fullmatch(text)
        unit = match.group(2).lower() if match else ""
        if match is None or unit not in _UNITS:
            raise UsageError(
                f"{text!r} is not a size: expected bytes, a unit such as 700MB or 1.5GiB, or a share such as 60%"
            )
        size = int(Fraction(match.group(1)) * _UNITS[unit])
    if size <= 0:
        raise UsageError(f"{text!r} is not a size: expected more than zero bytes")
    return size


def format_size(size: int | float) -> str:
    """`size` bytes in binary units with about three digits: "224 MiB", "1.5 GiB", "-3.2 MiB"."""
    sign, value = ("-" if size < 0 else ""), float(min(abs(size), _MOST_SHOWN))
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 100 else 1
    return f"{sign}{value:.{digits}f} {unit}"
