"""Where a prompt comes from: the command line, or standard input."""

from __future__ import annotations

import io
import sys
from typing import BinaryIO

from packager.errors import UsageError


def prompt_of(given: str | None) -> str:
    """The prompt as given, or standard input where that is "-", or nothing and input is piped in. UsageError where
    there is none, or it is no UTF-8 text."""
    if given is not None and given != "-":
        return given
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("the following arguments are required: --prompt TEXT, or --chat, or a prompt piped in")
    stream: BinaryIO | None = sys.stdin.buffer if isinstance(sys.stdin, io.TextIOWrapper) else None
    if stream is None:
        return sys.stdin.read() if sys.stdin is not None else ""
    try:
        text = stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None
    # The line's end that `echo` and editors put there is no part of the prompt.
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UsageError("standard input is empty: expected a prompt")
    return text
