"""Hashes, JSON with a fixed form, and writing that leaves all or nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from packager.errors import ArtifactError
from packager.io import plain_json

_CHUNK = 1 << 20
BUNDLE_MARK = "packager.json"
MAP_MARK = "map.json"
"""A folder that holds one of these is a bundle or a map, and may be replaced by another."""


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
    """`root/name`, refused when `name` is absolute, climbs out with "..", or passes through a symbolic link."""
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or any(character in name for character in "\\:\0"):
        raise ArtifactError(f"path {name!r} leaves its folder {root}: refused")
    path = root
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise ArtifactError(f"{path} is a symbolic link: refused, artefacts hold plain files only")
    return path


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in one step: the old file or the new one, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` with `content` in one step: the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def refuse_existing(target: Path, *, force: bool) -> None:
    """ArtifactError when `target` exists and may not be replaced: without `force`, or when it is no artefact of
    ours."""
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ArtifactError(f"{target} exists already: choose another name, or pass --force to replace it")
    if (
        target.is_symlink()
        or not target.is_dir()
        or (any(target.iterdir()) and not any((target / name).is_file() for name in (BUNDLE_MARK, MAP_MARK)))
    ):
        raise ArtifactError(
            f"{target} is no map or bundle, so --force does not replace it: choose another name, or remove it yourself"
        )


@contextlib.contextmanager
def published_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A staging folder beside `target`, flushed and renamed onto it when the block ends well.

    When the block fails, or the process is killed, nothing appears under the final name; on an
    ordinary failure the staging folder is removed too. An existing target needs `force`, and stays
    whole until the new folder is complete.
    """
    refuse_existing(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.staging-", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o755)
        _flush_tree(staging)
        _swap(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _swap(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.retired-", dir=target.parent))
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


def _flush_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root, root.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
