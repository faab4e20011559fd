"""The `packager` command: arguments in, text or JSON out. It decides nothing; heavy imports happen inside the verbs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence

from packager.cli.parser import parse
from packager.errors import PackagerError

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
        status = int(arguments.verb(arguments))
        print(end="", flush=True)  # here, where a reader that has gone is an exception to catch
        return status
    except PackagerError as error:
        # Not from what was parsed: it may be that nothing could be.
        if any(len(word) > 2 and "--json".startswith(word) for word in words):
            detail = {key: value for key, value in vars(error).items() if isinstance(value, int | dict)}
            print(json.dumps({"error": type(error).__name__, "message": str(error)} | detail))
        print(f"packager: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "packager: interrupted; nothing was left under a final name, and 'packager score' resumes where it was",
            file=sys.stderr,
        )
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone: nothing more to say, and nothing to flush at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"packager: {error.strerror or error}{where}: free some space or choose another folder; nothing was left "
            f"half-written",
            file=sys.stderr,
        )
        return 1
