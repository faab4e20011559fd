"""The `packager` command: arguments in, text or JSON out. It decides nothing; heavy imports happen inside the verbs."""

from __future__ import annotations

import io
import json
import sys

from packager.cli.parser import make_parser
from packager.errors import PackagerError

_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns its exit status: 0 done, 1 error, 2 usage, 3 a check failed, 4 infeasible
    budget."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console's code page lacks most scripts
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.verb(arguments))
    except PackagerError as error:
        if getattr(arguments, "json", False):
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
        sys.stdout = None
        return 1
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"packager: {error.strerror or error}{where}: free some space or choose another folder; nothing was left "
            f"half-written",
            file=sys.stderr,
        )
        return 1
