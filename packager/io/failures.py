"""What goes wrong while an output is written, said once for whatever library wrote: where, why, and what to do.

A full disk is an OSError of Python's, an exception of safetensors' own, or hidden as the cause of another. The file
that an OSError names may be the one that was read: where the disk is full, it is never the one to speak of.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packager.errors import OutputError, PackagerError
from packager.sizes import format_size

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_FOLDER = ("a file stands where a folder is needed", "choose another path with -o")
_REFUSED = {
    errno.EACCES: (
        "you may not write there (permission denied)",
        "choose another folder with -o, or have its permissions changed",
    ),
    errno.EPERM: ("the system forbids it", "choose another folder with -o, or have its permissions changed"),
    errno.EROFS: ("that file system is read-only", "choose a folder on another one with -o"),
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.ENAMETOOLONG: ("the name is too long for that file system", "choose a shorter one with -o"),
    errno.EFBIG: ("the file is too large for that file system", "choose a folder on another one with -o"),
    errno.EIO: ("the disk fails", "look at the system's log, and choose a folder on another disk with -o"),
}
# safetensors and protobuf say the system's error in words, with its number; 112 and 39 are Windows' disk full.
_SAID = re.compile(r"No space left on device|not enough space on the disk|Disk quota exceeded|os error (28|112|122)\b")
_WINDOWS_FULL = (39, 112)


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that a disk or a quota is used up."""
    return _full(error) is not None


def output_error(error: BaseException, target: Path) -> OutputError | None:
    """What to tell a user whose `target` could not be written because of `error`; None where that says nothing of an
    output."""
    quota = _full(error)
    if quota is not None:
        place = _fullest(target)
        what = "the disk quota is used up on" if quota else "no space left on"
        return OutputError(
            f"{what} the disk of {place}{_free(place)}: free some space, or choose another folder with -o"
            f"{' (TMPDIR names the one for temporary files)' if place != _existing(target) else ''}; nothing was left "
            "half-written"
        )
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    names = [str(name) for name in (error.filename2, error.filename) if isinstance(name, str | os.PathLike)]
    around = str(_existing(target))
    inside = next((name for name in names if os.path.abspath(name).startswith(os.path.abspath(around))), None)  # noqa: PTH100  links are not followed
    if names and inside is None:
        return None  # a file that was read
    why, what = _REFUSED[error.errno]
    return OutputError(f"cannot write {target}: {why}: {what}; nothing was left half-written")


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn what goes wrong in the block into an OutputError about `target`, where it is a matter of the disk."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, PackagerError) as error:
        if (said := output_error(error, target)) is not None:
            raise said from error
        raise
    except Exception as error:
        # safetensors, onnx and torch have exceptions of their own for a full disk.
        if is_disk_full(error) and (said := output_error(error, target)) is not None:
            raise said from error
        raise


def _full(error: BaseException) -> bool | None:
    """Whether it is a quota (True) or the disk (False) that is used up; None for neither."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        number = each.errno if isinstance(each, OSError) else None
        if number in _FULL or getattr(each, "winerror", None) in _WINDOWS_FULL:
            return number != errno.ENOSPC and number is not None
        if number is None and (found := _SAID.search(str(each))):
            return "quota" in found[0] or found[1] == "122"
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return None


def _fullest(target: Path) -> Path:
    """Of the folders that are written to, the one on the disk with less space."""
    places = [_existing(target)]
    with contextlib.suppress(OSError):
        places.append(Path(tempfile.gettempdir()))
    return min(places, key=_free_bytes)


def _existing(target: Path) -> Path:
    """The nearest folder around `target` that is there."""
    return next((path for path in target.absolute().parents if path.is_dir()), Path("/"))


def _free_bytes(place: Path) -> int:
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return 0


def _free(place: Path) -> str:
    try:
        return f" ({format_size(shutil.disk_usage(place).free)} free now)"
    except OSError:
        return ""
