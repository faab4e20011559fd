"""One writer at a time for each output: the second is told at once who is at work on it.

The locks are the system's own (through `filelock`), so that those of dead processes hold nobody up. The lock of NAME
is the file `.NAME.lock` beside it, which is removed when the work ends; a killed process leaves it, and the next takes
it over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from packager.errors import OutputError

_PATIENCE_SECONDS = 0.3
"""Long enough for one that is just letting go of it."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, getattr(errno, "EOPNOTSUPP", errno.ENOSYS), errno.EINVAL}


@contextlib.contextmanager
def locked(target: Path) -> Iterator[bool]:
    """Hold the lock of `target`, whose folder must be there; whether there is one: some network file systems have none.

    The thread that holds it may take it again. OutputError where another process or thread holds it, OSError where its
    file cannot be made.
    """
    from filelock import FileLock, Timeout

    path = lock_path(target)
    lock = FileLock(path, timeout=_PATIENCE_SECONDS, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{target} is being written by another process{_holder(path)}: wait until that has finished, stop it, or "
            "choose another name with -o"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield False
        return
    try:
        if lock.lock_counter == 1:
            _sign(path)
        yield True
    finally:
        if lock.lock_counter == 1:
            # Before it is let go of: whoever opened the file meanwhile sees that it has no name any more. Windows does
            # not remove a file that is open, there filelock does when it has closed it.
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()


def lock_path(target: Path) -> Path:
    """The file whose lock stands for `target`."""
    return target.parent / f".{target.name}.lock"


def _sign(path: Path) -> None:
    """Say in the lock's file who holds it. Where the system has no locks, filelock says so in its own way: kept."""
    with contextlib.suppress(OSError):
        if path.read_bytes()[:1] in (b"", b"{"):
            since = datetime.now(UTC).isoformat(timespec="seconds")
            path.write_text(json.dumps({"pid": os.getpid(), "since": since}), encoding="utf-8")


def _holder(path: Path) -> str:
    """Who holds the lock, as far as its file says so; Windows lets nobody read it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        since = datetime.fromisoformat(found["since"]).astimezone()
        return f" (pid {int(found['pid'])}, since {since:%Y-%m-%d %H:%M:%S})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
