"""Paths stay inside, hashes are fixed, and what is published is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import ArtifactError
from packager.io.files import dump_json, inner_path, published_folder, read_json, sha256_file, sha256_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../../b", "/etc/passwd", "//a", "a/..", "a\\b", "C:/a", "..\\a", "a\0b"]
)
def test_paths_that_leave_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        inner_path(tmp_path, name)
    assert str(caught.value) == f"path {name!r} leaves its folder {tmp_path}: refused"


@given(st.text(max_size=20))
def test_any_name_stays_inside_or_is_refused(name: str) -> None:
    root = Path("/somewhere/else")
    try:
        path = inner_path(root, name)
    except ArtifactError:
        return
    assert path != root
    assert os.path.normpath(path).startswith("/somewhere/else/")


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "other").symlink_to("file")
    (tmp_path / "gone").symlink_to("nowhere")
    assert inner_path(tmp_path, "real/file") == tmp_path / "real" / "file"
    for name, link in (("link/file", "link"), ("real/other", "real/other"), ("gone", "gone")):
        with pytest.raises(ArtifactError) as caught:
            inner_path(tmp_path, name)
        assert str(caught.value) == f"{tmp_path / link} is a symbolic link: refused, artefacts hold plain files only"


@given(values)
def test_json_has_one_form(value: object) -> None:
    text = dump_json(value)
    assert json.loads(text) == value
    assert text.endswith("\n")
    assert dump_json(json.loads(text)) == text
    assert sha256_json(value) == hashlib.sha256(text.encode()).hexdigest()


def test_json_has_sorted_keys_and_no_nan() -> None:
    assert dump_json({"b": 1, "a": {"d": "é", "c": 2}}) == '{\n  "a": {\n    "c": 2,\n    "d": "é"\n  },\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range float values"):
        dump_json({"a": float("nan")})


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_hash_of_a_file(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    with pytest.raises(ArtifactError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path} is missing: the folder is incomplete, make it again"
    path.write_text("[1]")
    with pytest.raises(ArtifactError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path}: expected a JSON object, found list"
    for content in (b"{", b"\xff", b'{"a": ' + b"1" * 5000 + b"}", b"[" * 100_000, b""):
        path.write_bytes(content)
        with pytest.raises(
            ArtifactError, match=r"some\.json is not readable JSON \(.*\): the file is damaged, make it again$"
        ):
            read_json(path)


def test_write_text_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "one")
    write_text(path, "twö")
    assert path.read_text(encoding="utf-8") == "twö"
    assert names(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "three")
    assert path.read_text(encoding="utf-8") == "twö"
    assert names(path.parent) == ["file.txt"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _publish(target: Path, content: str, *, force: bool = False) -> None:
    with published_folder(target, force=force) as staging:
        (staging / "packager.json").write_text(content)
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text(content)


def test_a_folder_is_published_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    _publish(target, "one")
    assert (target / "inner" / "file").read_text() == "one"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with published_folder(target) as staging:
        assert not target.exists()
        assert staging.parent == tmp_path
        assert staging.name.startswith(".")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), published_folder(tmp_path / "bundle") as staging:  # noqa: PT012  both raise together
        (staging / "half").write_text("")
        raise error
    assert names(tmp_path) == []


def test_a_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    with pytest.raises(RuntimeError), published_folder(target, force=True) as staging:  # noqa: PT012  both raise together
        (staging / "packager.json").write_text("new")
        assert (target / "packager.json").read_text() == "old"
        raise RuntimeError
    assert (target / "packager.json").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    (target / "report.json").write_text("old")
    _publish(target, "new", force=True)
    assert (target / "packager.json").read_text() == "new"
    assert not (target / "report.json").exists()
    assert names(tmp_path) == ["bundle"]


def test_an_existing_target_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    with pytest.raises(ArtifactError) as caught:
        _publish(target, "new")
    assert str(caught.value) == f"{target} exists already: choose another name, or pass --force to replace it"
    assert (target / "packager.json").read_text() == "old"


@pytest.mark.parametrize("kind", ["folder", "file", "link", "broken link"])
def test_force_does_not_replace_what_is_no_artefact(tmp_path: Path, kind: str) -> None:
    target, precious = tmp_path / "target", tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    match kind:
        case "folder":
            precious.rename(target)
        case "file":
            target.write_text("years of work")
        case "link":
            target.symlink_to(precious)
        case "broken link":
            target.symlink_to(tmp_path / "nowhere")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ArtifactError) as caught:
        _publish(target, "new", force=True)
    assert (
        str(caught.value)
        == f"{target} is no map or bundle, so --force does not replace it: choose another name, or remove it yourself"
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    _publish(tmp_path / "bundle", "new", force=True)
    assert (tmp_path / "bundle" / "packager.json").read_text() == "new"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    rename, calls = Path.rename, []

    def refuse(self: Path, other: Path) -> Path:
        calls.append(other)
        if len(calls) == failing:
            raise OSError(errno.EACCES, "refused")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        _publish(target, "new", force=True)
    assert (target / "packager.json").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_an_old_folder_that_cannot_be_put_back_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    rename, calls = Path.rename, []

    def refuse(self: Path, other: Path) -> Path:
        calls.append(other)
        if len(calls) > 1:
            raise OSError(errno.EACCES, "refused")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="refused"):
        _publish(target, "new", force=True)
    (kept,) = tmp_path.glob(".bundle.retired-*/old/packager.json")
    assert kept.read_text() == "old"
