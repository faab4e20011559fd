"""Paths stay inside, hashes are fixed, and what is published is whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.errors import ArtifactError
from packager.io.files import (
    copy_range,
    dump_json,
    inner_path,
    read_json,
    refuse_stray_links,
    require_distinct,
    sha256_file,
    sha256_json,
    umask,
    write_text,
)


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


@pytest.mark.parametrize(
    "name",
    [
        "nul",
        "a/CON",
        "com1.txt",
        "LPT9 .x",
        "COM¹",
        "aux.tar.gz",
        "conin$",
        "end.",
        "a /b",
        "what?",
        "tab\there",
        "a<b",
    ],
)
def test_names_that_some_system_takes_for_something_else_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"is refused: .*, which some systems take for something else$"):
        inner_path(tmp_path, name)


@pytest.mark.parametrize(
    "name", ["console", "com10", "nullable.json", ".gitattributes", "model.layers.0", "né/ü", "a b"]
)
def test_names_that_only_look_alike_are_taken(tmp_path: Path, name: str) -> None:
    assert inner_path(tmp_path, name) == tmp_path / name


def test_names_that_are_one_file_on_some_systems_are_refused() -> None:
    require_distinct(["a", "b/a", "A/b"], "here")
    for first, second in (("a/B", "A/b"), ("n\u00e9", "ne\u0301"), ("x", "x")):
        with pytest.raises(ArtifactError) as caught:
            require_distinct([first, second], "here")
        assert str(caught.value) == f"here: {first!r} and {second!r} are the same file on some systems: refused"


def test_links_to_files_are_let_pass_and_others_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("", encoding="utf-8")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "other").symlink_to("file")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    assert inner_path(tmp_path, "real/file") == tmp_path / "real" / "file"
    assert inner_path(tmp_path, "real/other") == tmp_path / "real" / "other"
    for name, link, what in (
        ("link/file", "link", "to a folder"),
        ("link", "link", "to a folder"),
        ("gone", "gone", "to no file"),
        ("round", "round", "to no file"),
    ):
        with pytest.raises(ArtifactError) as caught:
            inner_path(tmp_path, name)
        assert str(caught.value) == (
            f"{tmp_path / link} is a symbolic link {what}: refused, artefacts hold files, or links to files whose "
            "bytes are theirs: copy the folder with its links resolved (cp -rL) and use the copy"
        )


def test_links_that_nobody_lists_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", ".gitattributes"):
        (tmp_path / name).symlink_to("/etc/hostname")
    refuse_stray_links(tmp_path, ["a", "b"])
    with pytest.raises(ArtifactError, match=r"/b is a symbolic link, and not one of the files that .* lists"):
        refuse_stray_links(tmp_path, ["a"])


@pytest.mark.parametrize("how", ["sendfile", "no sendfile", "refused", "another system"])
def test_a_range_is_copied_with_or_without_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "from").write_bytes(content)
    match how:
        case "no sendfile":
            monkeypatch.delattr(os, "sendfile")
        case "refused":

            def refused(*arguments: object) -> int:
                raise OSError(errno.EINVAL, "not on this file system")

            monkeypatch.setattr(os, "sendfile", refused)
        case "another system":
            monkeypatch.setattr(sys, "platform", "darwin")
    with (tmp_path / "from").open("rb") as source, (tmp_path / "to").open("wb") as out:
        out.write(b"before")
        assert copy_range(source, 1000, 2_000_000, out) == 2_000_000
        assert out.tell() == 2_000_006
        out.write(b"after")
        assert copy_range(source, len(content) - 5, 50, out) == 5
        assert copy_range(source, 7, 0, out) == 0
    assert (tmp_path / "to").read_bytes() == b"before" + content[1000:2_001_000] + b"after" + content[-5:]


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
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "three")
    assert path.read_text(encoding="utf-8") == "twö"
    assert names(path.parent) == ["file.txt"]


def test_the_umask_is_read_where_it_is_told_and_asked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        assert umask() == 0o027
        monkeypatch.setattr(Path, "read_text", lambda *arguments, **named: "")
        assert umask() == 0o027
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_what_a_killed_writer_left_beside_a_file_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from packager.io import files\n"
        "os.fsync = lambda handle: os._exit(9)\n"
        "files.write_text(pathlib.Path(sys.argv[1]), 'half')"
    )
    path = tmp_path / "plan.json"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".plan.json.writing-")
    write_text(path, "whole")
    assert names(tmp_path) == ["plan.json"]
