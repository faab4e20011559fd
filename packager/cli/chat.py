"""A conversation on the terminal: a line is asked, and answered as the answer comes."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from packager.errors import RuntimeCheckError, UsageError

if TYPE_CHECKING:
    from packager.runtime.answers import Conversation


def talk(conversation: Conversation, *, quiet: bool) -> None:
    """Ask and answer until the input ends. Ctrl-C breaks an answer off, or ends the conversation between two.

    Only answers go to stdout. What cannot be answered, a line longer than the context, say, is said and passed over.
    """
    asks = sys.stdin.isatty()
    if asks and not quiet:
        _say("ask away; Ctrl-D ends, Ctrl-C breaks an answer off")
    forgotten = 0
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = _line("> " if asks else "")
            if not line.strip():
                continue
            try:
                answer = conversation.say(line)
            except RuntimeCheckError as error:
                _say(str(error))
                continue
            if conversation.forgotten > forgotten and not quiet:
                began = "" if forgotten else ": the conversation is longer than the context"
                _say(f"the oldest {conversation.forgotten} turns are forgotten{began}")
            forgotten = conversation.forgotten
            with contextlib.suppress(KeyboardInterrupt):
                for piece in answer:
                    print(piece, end="", flush=True)
            print(flush=True)
    if asks:
        print(file=sys.stderr)


def _line(mark: str) -> str:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it lets `input` edit lines and remember them

    try:
        return input(mark)
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not {error.encoding} text") from None


def _say(text: str) -> None:
    print(f"packager: {text}", file=sys.stderr)
