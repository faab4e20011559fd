"""Hashes, JSON with a fixed form, paths within a folder, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from packager.errors import ArtifactError
from packager.io import plain_json
from packager.io.leftovers import owned, sweep

_CHUNK = 1 << 20
_DEVICES = {
    *("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"),
    *(f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"),
}
"""Names that Windows keeps for devices, with any ending."""
_HARMLESS_LINKS = (".gitattributes",)
"""What a model hub's cache links beside the files of a repository."""


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in its fixed form, whatever the order of its keys."""
    return hashlib.sha256(dump_json(value).encode()).hexdigest()


def dump_json(value: Any) -> str:
    """JSON with sorted keys, two spaces, and a final newline; NaN and infinity are refused."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ArtifactError names the file when it is missing or is not one."""
    return plain_json.read_object(path)


def inner_path(root: Path, name: str) -> Path:
    """`root/name`, refused when `name` leaves `root`, when some system could not hold it, or when a link is in its way.

    A link to a file is let pass, for a model hub's cache is made of them: the caller holds its bytes against their
    hash. One to a folder, or to nothing, is not.
    """
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or any(character in name for character in "\\:\0"):
        raise ArtifactError(f"path {name!r} leaves its folder {root}: refused")
    if why := next(filter(None, map(_unportable, pure.parts)), None):
        raise ArtifactError(f"path {name!r} in {root} is refused: {why}, which some systems take for something else")
    path = root
    for number, part in enumerate(pure.parts, 1):
        path = path / part
        if path.is_symlink() and not (number == len(pure.parts) and path.is_file()):
            raise ArtifactError(
                f"{path} is a symbolic link {'to a folder' if path.is_dir() else 'to no file'}: refused, artefacts "
                "hold files, or links to files whose bytes are theirs: copy the folder with its links resolved "
                "(cp -rL) and use the copy"
            )
    return path


def _unportable(part: str) -> str | None:
    """Why one part of a path is not the same file on every system."""
    if part.endswith((".", " ")):
        return f"{part!r} ends with a dot or a space"
    if part.partition(".")[0].rstrip(" ").upper() in _DEVICES:
        return f"{part!r} is the name of a device"
    if any(character < " " or character in '<>"|?*' for character in part):
        return f"{part!r} holds a character that is no part of a name"
    return None


def require_distinct(names: Iterable[str], where: str) -> None:
    """ArtifactError when two of the paths `names` are one file where neither case counts nor how an accent is spelt."""
    seen: dict[str, str] = {}
    for name in names:
        same = unicodedata.normalize("NFC", name).casefold()
        if same in seen:
            raise ArtifactError(f"{where}: {seen[same]!r} and {name!r} are the same file on some systems: refused")
        seen[same] = name


def refuse_stray_links(root: Path, listed: Iterable[str]) -> None:
    """ArtifactError for a symbolic link in folder `root` that is none of the paths `listed`, whose bytes are known."""
    known = {*listed, *_HARMLESS_LINKS}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() and path.relative_to(root).as_posix() not in known:
            raise ArtifactError(
                f"{path} is a symbolic link, and not one of the files that {root} lists: remove it, or copy the listed "
                "files alone"
            )


def copy_range(source: BinaryIO, offset: int, length: int, destination: BinaryIO) -> int:
    """Append `length` bytes at `offset` of an open file to another, in the kernel where it can. Returns how many there
    were: fewer where the source ends before."""
    start = destination.tell()
    destination.flush()
    copied = 0
    send = getattr(os, "sendfile", None) if sys.platform == "linux" else None
    try:
        while send is not None and copied < length:
            moved = send(destination.fileno(), source.fileno(), offset + copied, length - copied)
            if not moved:
                return copied
            copied += moved
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # others say that this file system has no such copying: go on by hand
    finally:
        destination.seek(start + copied)
    source.seek(offset + copied)
    while copied < length and (piece := source.read(min(_CHUNK, length - copied))):
        destination.write(piece)
        copied += len(piece)
    return copied


def umask() -> int:
    """The permissions that this process withholds from what it makes; none on Windows, which has no such."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    ask = getattr(os, "umask", None)
    if os.name == "nt" or ask is None:
        return 0
    # Elsewhere it is told only while it is changed, for all threads.
    found = int(ask(0o077))
    ask(found)
    return found


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step: the old file or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` with `content` in one step: the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.writing-"
    sweep(path.parent, prefix)
    handle, temporary = tempfile.mkstemp(prefix=owned(prefix), dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
