"""A full disk is told in one way, whoever found it full, and a file that was read is never blamed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from packager.errors import ArtifactError, ExportError, OutputError
from packager.io import failures
from packager.io.failures import explained, is_disk_full, output_error


def chained(cause: BaseException) -> Exception:
    """An error of a library that was caused by another."""
    try:
        try:
            raise cause
        except Exception as error:
            raise RuntimeError("serialisation failed") from error
    except RuntimeError as outer:
        return outer


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/the/source", None, "/the/copy"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    SafetensorError("Error while serializing: I/O error: There is not enough space on the disk. (os error 112)"),
    chained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    RuntimeError("[enforce fail at inline_container.cc:603] . write failed: No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_told_in_one_way(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_free_bytes", lambda place: 0 if place == tmp_path else 1)
    assert is_disk_full(error)
    with pytest.raises(OutputError) as caught, explained(tmp_path / "a" / "out.map"):
        raise error
    said = str(caught.value)
    assert said.startswith(f"no space left on the disk of {tmp_path} (")
    assert said.endswith(" free now): free some space, or choose another folder with -o; nothing was left half-written")
    assert "/the/source" not in said


def test_where_the_place_for_temporary_files_is_full_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_free_bytes", lambda place: int(place == tmp_path))
    monkeypatch.setattr(failures.tempfile, "gettempdir", lambda: str(tmp_path.parent))
    said = str(output_error(FULL[0], tmp_path / "out.map"))
    assert said.startswith(f"no space left on the disk of {tmp_path.parent} (")
    assert "TMPDIR" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("I/O error: Disk quota exceeded (os error 122)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_quota_is_no_full_disk(tmp_path: Path, error: Exception) -> None:
    assert str(output_error(error, tmp_path / "out")).startswith("the disk quota is used up on the disk of ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO])
def test_other_refusals_say_what_where_and_what_to_do(tmp_path: Path, number: int) -> None:
    target = tmp_path / "out.map"
    for error in (OSError(number, "x"), OSError(number, "x", str(tmp_path / ".out.map.lock"))):
        said = str(output_error(error, target))
        assert said.startswith(f"cannot write {target}: ")
        assert "-o" in said
        assert said.endswith("; nothing was left half-written")
    assert output_error(OSError(number, "x", "/the/source"), target) is None


def test_what_is_no_matter_of_the_disk_is_left_alone(tmp_path: Path) -> None:
    for error in (
        ArtifactError("x"),
        ExportError("x"),
        OSError(errno.ENOENT, "x"),
        ValueError("x"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, explained(tmp_path / "out"):
            raise error
        assert caught.value is error
