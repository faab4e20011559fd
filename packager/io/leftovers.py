"""Names that say which process made a folder, so that what a killed one left behind is known, and removed.

A name ends with "PID-STARTED-HOST-RANDOM". A process is known by its number and the moment it started, for numbers are
given out again; HOST stands for the machine and its space of process numbers, for a folder may be shared by containers
or over a network, and nobody can tell from here whether a process lives there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OWNER = re.compile(r"(\d+)-(\d+)-([0-9a-f]{8})-\w+")
_SCRATCH = "packager-scratch-"


def owned(prefix: str) -> str:
    """`prefix` for `tempfile.mkdtemp` and `mkstemp`, with this process's mark after it."""
    return f"{prefix}{os.getpid()}-{_started(os.getpid())}-{_host()}-"


def sweep(folder: Path, prefix: str, *, locked: bool = False) -> None:
    """Remove what dead processes left in `folder` under names that begin with `prefix`.

    With `locked` the caller holds the lock that everyone holds who makes such names, so that those of other hosts, and
    those without an owner, are dead as well. What cannot be removed is left.
    """
    for path in abandoned(folder, prefix, locked=locked):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def abandoned(folder: Path, prefix: str, *, locked: bool = False) -> list[Path]:
    """What dead processes left in `folder` under names that begin with `prefix`; see `sweep`."""
    try:
        found = sorted(path for path in folder.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []
    return [path for path in found if _dead(path.name.removeprefix(prefix), locked=locked)]


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder, in `parent` or the system's place for them, for as long as the block lasts.

    Those of processes that were killed are removed first.
    """
    place = parent or Path(tempfile.gettempdir())
    sweep(place, _SCRATCH)
    folder = Path(tempfile.mkdtemp(prefix=owned(_SCRATCH), dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _dead(mark: str, *, locked: bool) -> bool:
    owner = _OWNER.fullmatch(mark)
    if owner is None:
        return locked
    pid, started, host = int(owner[1]), int(owner[2]), owner[3]
    if host != _host():
        return locked
    return _started(pid) != started


def _started(pid: int) -> int:
    """When process `pid` began, in a unit of the system's own; 0 where there is no such process, 1 where the system
    does not tell when."""
    try:
        # Behind the name, which may hold spaces and brackets, field 22 counts clock ticks since the system began.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        if Path("/proc/self/stat").exists():
            return 0
    try:
        import psutil
    except ImportError:
        return _answers(pid)
    try:
        return int(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0
    except psutil.Error:
        return 1


def _answers(pid: int) -> int:
    """1 where process `pid` is there, 0 where it is not. On Windows, where a signal of 0 would end it, always 1."""
    if os.name == "nt":
        return 1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except OSError:
        return 1
    return 1


@functools.cache
def _host() -> str:
    try:
        numbers = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        numbers = 0
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]
