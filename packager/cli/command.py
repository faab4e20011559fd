"""The `packager` command: arguments in, text or JSON out. It decides nothing; heavy imports happen inside the verbs."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import platform
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packager.api.threads import let_threads_sleep
from packager.cli.parser import asked_for, parse
from packager.errors import PackagerError
from packager.io.failures import is_disk_full, output_error
from packager.runtime.processes import StoppedError, stopping

_INTERRUPTED = 130
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ISSUES = "https://github.com/edge-packager/edge-packager/issues"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns its exit status: 0 done, 1 error, 2 usage, 3 a check failed, 4 infeasible
    budget.

    What no part of the package expects is said in one line too; `-v` shows where it happened, and in an environment
    with PACKAGER_DEBUG set it is raised.
    """
    let_threads_sleep()
    words = list(sys.argv[1:] if argv is None else argv)
    # A console's code page lacks most scripts: what it has no letter for is a question mark, and no traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        arguments = parse(words)
        if arguments.verbose:
            print(_setting(), file=sys.stderr)
        with stopping():
            status = int(arguments.verb(arguments))
        print(end="", flush=True)  # here, where a reader that has gone is an exception to catch
        return status
    except PackagerError as error:
        if asked_for("--verbose", words):
            traceback.print_exc()
        detail = {key: value for key, value in vars(error).items() if isinstance(value, int | dict)}
        _say(words, type(error).__name__, str(error), detail)
        return error.exit_code
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
        if isinstance(error, OSError) or is_disk_full(error):
            name = getattr(error, "filename", None)
            said = output_error(error, Path(name if isinstance(name, str) else "here"))
            _say(words, "OutputError", str(said or f"{error}; nothing was left half-written"))
            return 1
        if os.environ.get("PACKAGER_DEBUG"):
            raise
        if verbose := asked_for("--verbose", words):
            traceback.print_exc()
        what = "what stands above" if verbose else "what the same command says with -v"
        found = f"{type(error).__name__}: {_one_line(str(error))}"
        _say(words, "InternalError", f"internal error ({found}): please report it with {what}, at {_ISSUES}")
        return 1


def _say(words: Sequence[str], kind: str, message: str, detail: Mapping[str, Any] | None = None) -> None:
    """An error, on stderr, and as JSON on stdout where that was asked for."""
    if asked_for("--json", words):
        print(json.dumps({"error": kind, "message": message} | dict(detail or {})))
    print(f"packager: {message}", file=sys.stderr)


def _setting() -> str:
    """Versions, and where this runs; nothing is imported for it."""
    from importlib import metadata

    from packager import __version__

    found = [f"packager {__version__}", f"Python {platform.python_version()}"]
    for library in ("onnxruntime", "onnxruntime-genai", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{library} {metadata.version(library)}")
    return f"packager: {', '.join(found)}; {platform.platform()}; in {Path.cwd()}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
