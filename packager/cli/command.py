"""The `packager` command: arguments in, text or JSON out. It decides nothing; heavy imports happen inside the verbs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from packager.cli.parser import parse
from packager.errors import OutputError, PackagerError
from packager.io.failures import is_disk_full, output_error
from packager.runtime.processes import StoppedError, stopping

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns its exit status: 0 done, 1 error, 2 usage, 3 a check failed, 4 infeasible
    budget."""
    words = list(sys.argv[1:] if argv is None else argv)
    # A console's code page lacks most scripts: what it has no letter for is a question mark, and no traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        arguments = parse(words)
        with stopping():
            status = int(arguments.verb(arguments))
        print(end="", flush=True)  # here, where a reader that has gone is an exception to catch
        return status
    except PackagerError as error:
        return _refused(error, words)
    except KeyboardInterrupt as stopped:
        print(
            "packager: interrupted; nothing was left under a final name, and 'packager score' resumes where it was",
            file=sys.stderr,
        )
        return stopped.status if isinstance(stopped, StoppedError) else _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone: nothing more to say, and nothing to flush at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        name = getattr(error, "filename", None)
        said = output_error(error, Path(name if isinstance(name, str) else "here"))
        return _refused(said or OutputError(f"{error}; nothing was left half-written"), words)


def _refused(error: PackagerError, words: Sequence[str]) -> int:
    """Say what is wrong, as JSON too where that was asked for; the exit status."""
    # Not from what was parsed: it may be that nothing could be.
    if any(len(word) > 2 and "--json".startswith(word) for word in words):
        detail = {key: value for key, value in vars(error).items() if isinstance(value, int | dict)}
        print(json.dumps({"error": type(error).__name__, "message": str(error)} | detail))
    print(f"packager: {error}", file=sys.stderr)
    return error.exit_code
