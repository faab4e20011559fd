"""The `packager` command: arguments in, text or JSON out. It decides nothing; heavy imports happen inside the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from packager.cli.parser import make_parser
from packager.errors import OutputError, PackagerError
from packager.io.failures import is_disk_full, output_error
from packager.runtime.processes import StoppedError, stopping

_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command line. Returns its exit status: 0 done, 1 error, 2 usage, 3 a check failed, 4 infeasible
    budget."""
    arguments = make_parser().parse_args(argv)
    try:
        with stopping():
            return int(arguments.verb(arguments))
    except PackagerError as error:
        if getattr(arguments, "json", False):
            detail = {key: value for key, value in vars(error).items() if isinstance(value, int | dict)}
            print(json.dumps({"error": type(error).__name__, "message": str(error)} | detail))
        print(f"packager: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        print(
            "packager: interrupted; nothing was left under a final name, and 'packager score' resumes where it was",
            file=sys.stderr,
        )
        return stopped.status if isinstance(stopped, StoppedError) else _INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone: nothing more to say, and nothing to flush at exit.
        sys.stdout = None
        return 1
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        name = getattr(error, "filename", None)
        said = output_error(error, Path(name if isinstance(name, str) else "here"))
        if said is None:
            said = OutputError(f"{error}; nothing was left half-written")
        print(f"packager: {said}", file=sys.stderr)
        return 1
