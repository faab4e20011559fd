"""Outputs: refused before the work where they may not be written, and published whole or not at all.

An output is reserved while it is made: its lock is held, what killed processes left beside it is gone, and its place
has been written to. It is staged beside its name and renamed onto it in the end. Only an artefact of the same kind is
replaced, and only when told to.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import ArtifactError
from packager.io.failures import explained
from packager.io.files import umask, write_bytes
from packager.io.leftovers import abandoned, owned, sweep
from packager.io.locks import locked

_OF_SYSTEMS = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in a folder that somebody looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """What tells a folder of ours: `marker` is a JSON object with an integer `schema` and the objects or lists `keys`.

    `listed` are the files that the marker names; `known` are others that may lie there.
    """

    noun: str
    marker: str
    keys: tuple[str, ...]
    listed: Callable[[Mapping[str, Any]], Iterable[str]]
    known: frozenset[str] = frozenset()


def refuse_existing(target: Path, kind: Artefact, *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """ArtifactError when folder `target` may not be written: it is, lies in or lies around one of `inputs`; it exists
    and `force` was not given; or it is no artefact of this kind, or holds what is none of ours."""
    for path in inputs:
        if path.exists() and (how := _overlap(target, path)):
            raise ArtifactError(f"{target} {how} the input {path}: choose another name with -o")
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ArtifactError(f"{target} exists already: choose another name, or pass --force to replace it")
    if why := _foreign(target, kind):
        raise ArtifactError(
            f"{target} is not replaced, even with --force: {why}: choose another name, or remove it yourself"
        )


@contextlib.contextmanager
def reserved(target: Path, kind: Artefact, *, force: bool, inputs: Iterable[Path] = ()) -> Iterator[None]:
    """Keep folder `target` for this thread while the block makes it; see `refuse_existing`.

    OutputError where another process has it, or where nothing can be written; also for what goes wrong in the block
    because a disk is full. Folders above `target` are made, and removed where the block fails.
    """
    inputs = tuple(inputs)
    refuse_existing(target, kind, force=force, inputs=inputs)
    with explained(target), _folders_above(target), locked(target) as sure:
        if sure:
            _put_back(target)
            sweep(target.parent, f".{target.name}.staging-", locked=True)
        refuse_existing(target, kind, force=force, inputs=inputs)
        yield


@contextlib.contextmanager
def published_folder(
    target: Path, kind: Artefact, *, force: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """A staging folder beside `target`, flushed and renamed onto it when the block ends well.

    When the block fails, or the process is killed, nothing appears under the final name; on an ordinary failure the
    staging folder is removed too, else by the next that writes there. An existing target needs `force`, and stays
    whole until the new folder is complete. Errors: see `reserved`.
    """
    with reserved(target, kind, force=force, inputs=inputs):
        staging = Path(tempfile.mkdtemp(prefix=owned(f".{target.name}.staging-"), dir=target.parent))
        try:
            yield staging
            _set_modes(staging)
            _flush_tree(staging)
            # Whoever does not know of locks may have put something there meanwhile.
            refuse_existing(target, kind, force=force)
            _swap(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def require_file(
    target: Path, *, force: bool, ours: Callable[[Path], bool] = lambda path: False, inputs: Iterable[Path] = ()
) -> None:
    """Before the work for it begins, refuse a file that may not or cannot be written.

    ArtifactError where it is or lies in an input, or exists and is none of `ours` and `force` was not given;
    OutputError where its folder takes no files.
    """
    for path in inputs:
        if path.exists() and (how := _overlap(target, path)):
            raise ArtifactError(f"{target} {how} the input {path}: choose another name with -o")
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise ArtifactError(f"{target} is no plain file, and is not replaced: choose another name with -o")
    if target.exists() and not force and not ours(target):
        raise ArtifactError(f"{target} exists already: choose another name, or pass --force to replace it")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass


def write_output(target: Path, content: bytes) -> None:
    """Replace the file `target` in one step; OutputError where it cannot be written."""
    with explained(target):
        write_bytes(target, content)


def _overlap(target: Path, other: Path) -> str | None:
    """How two paths lie to each other, links followed: is, is inside, or holds; None for apart."""
    one, two = target.resolve(), other.resolve()
    if one == two or (one.exists() and one.samefile(two)):
        return "is"
    if two in one.parents:
        return "is inside"
    return "holds" if one in two.parents else None


def _foreign(target: Path, kind: Artefact) -> str | None:
    """Why `target` is not an artefact of this kind that may be deleted; an empty folder may."""
    if target.is_symlink() or not target.is_dir():
        return f"it is no folder, and a {kind.noun} is one"
    found = sorted(path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    if not found:
        return None
    try:
        document = json.loads((target / kind.marker).read_text(encoding="utf-8"))
        whole = type(document["schema"]) is int and all(isinstance(document[key], dict | list) for key in kind.keys)
        names = {kind.marker, *kind.known, *kind.listed(document)}
    except OSError:
        return f"it is no {kind.noun} of ours ({kind.marker} is missing)"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        return f"it is no {kind.noun} of ours ({kind.marker} is another file)"
    names |= {path.relative_to(target).as_posix() for path in found if path.name in _OF_SYSTEMS}
    stray = [path for path in found if path.relative_to(target).as_posix() not in names]
    return f"it holds {stray[0].relative_to(target)}, which is no part of a {kind.noun}" if stray else None


@contextlib.contextmanager
def _folders_above(target: Path) -> Iterator[None]:
    """Make the folders above `target`; when the block fails, remove those that were made and are empty."""
    made = [path for path in target.absolute().parents if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def _put_back(target: Path) -> None:
    """What a process left that was killed between the two renames of `_swap`, where it is still needed."""
    for retired in abandoned(target.parent, f".{target.name}.retired-", locked=True):
        if (retired / "old").exists() and not target.exists():
            (retired / "old").rename(target)
        shutil.rmtree(retired, ignore_errors=True)


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    retired = Path(tempfile.mkdtemp(prefix=owned(f".{target.name}.retired-"), dir=target.parent))
    try:
        target.rename(retired / "old")
        try:
            staging.rename(target)
        except BaseException:
            (retired / "old").rename(target)
            raise
    except BaseException:
        # Only when empty: an old folder that could not be put back is kept.
        with contextlib.suppress(OSError):
            retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _set_modes(root: Path) -> None:
    """Let others read what this user may let them: some libraries write files for their owner alone."""
    withheld = umask()
    for path in [*root.rglob("*"), root]:
        path.chmod((0o755 if path.is_dir() else 0o644) & ~withheld)


def _flush_tree(root: Path) -> None:
    # Windows flushes only what is open for writing, and no folders.
    windows = os.name == "nt"
    for path in [*root.rglob("*"), root, root.parent]:
        if windows and path.is_dir():
            continue
        handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
