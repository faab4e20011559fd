"""Outputs are refused before the work, held by one writer, published whole, and replaced only when told to."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.errors import ArtifactError, OutputError
from packager.io import outputs
from packager.io.files import dump_json
from packager.io.leftovers import owned
from packager.io.outputs import Artefact, published_folder, refuse_existing, require_file, reserved, write_output

BUNDLE = Artefact(
    noun="bundle",
    marker="packager.json",
    keys=("files",),
    listed=lambda manifest: [entry["path"] for entry in manifest["files"]],
    known=frozenset({"report.json"}),
)
MAP = Artefact(noun="map", marker="map.json", keys=("model", "files"), listed=lambda identity: identity["files"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def marker(content: str) -> str:
    return dump_json({"schema": 1, "content": content, "files": [{"path": "inner/file"}]})


def content(folder: Path) -> str:
    return str(json.loads((folder / "packager.json").read_text(encoding="utf-8"))["content"])


def _publish(target: Path, content: str, *, force: bool = False) -> None:
    with published_folder(target, BUNDLE, force=force) as staging:
        (staging / "packager.json").write_text(marker(content), encoding="utf-8")
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text(content, encoding="utf-8")


def test_a_folder_is_published_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    _publish(target, "one")
    assert (target / "inner" / "file").read_text(encoding="utf-8") == "one"
    assert names(target.parent) == ["bundle"]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with published_folder(target, BUNDLE) as staging:
        assert not target.exists()
        assert staging.parent == tmp_path
        assert staging.name.startswith(".")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), published_folder(tmp_path / "bundle", BUNDLE) as staging:  # noqa: PT012  both raise together
        (staging / "half").write_text("", encoding="utf-8")
        raise error
    assert names(tmp_path) == []


def test_a_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    with pytest.raises(RuntimeError), published_folder(target, BUNDLE, force=True) as staging:  # noqa: PT012  both raise together
        (staging / "packager.json").write_text("new", encoding="utf-8")
        assert content(target) == "old"
        raise RuntimeError
    assert content(target) == "old"
    assert names(tmp_path) == ["bundle"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    (target / "report.json").write_text("old", encoding="utf-8")
    _publish(target, "new", force=True)
    assert content(target) == "new"
    assert not (target / "report.json").exists()
    assert names(tmp_path) == ["bundle"]


def test_an_existing_target_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    with pytest.raises(ArtifactError) as caught:
        _publish(target, "new")
    assert str(caught.value) == f"{target} exists already: choose another name, or pass --force to replace it"
    assert content(target) == "old"


@pytest.mark.parametrize("kind", ["folder", "file", "link", "broken link"])
def test_force_does_not_replace_what_is_no_artefact(tmp_path: Path, kind: str) -> None:
    target, precious = tmp_path / "target", tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work", encoding="utf-8")
    match kind:
        case "folder":
            precious.rename(target)
        case "file":
            target.write_text("years of work", encoding="utf-8")
        case "link":
            target.symlink_to(precious)
        case "broken link":
            target.symlink_to(tmp_path / "nowhere")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ArtifactError) as caught:
        _publish(target, "new", force=True)
    why = (
        "it is no bundle of ours (packager.json is missing)"
        if kind == "folder"
        else "it is no folder, and a bundle is one"
    )
    assert str(caught.value) == (
        f"{target} is not replaced, even with --force: {why}: choose another name, or remove it yourself"
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    _publish(tmp_path / "bundle", "new", force=True)
    assert content(tmp_path / "bundle") == "new"


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
    with pytest.raises(OutputError, match="you may not write there"):
        _publish(target, "new", force=True)
    assert content(target) == "old"
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
    with pytest.raises(OutputError, match="you may not write there"):
        _publish(target, "new", force=True)
    (kept,) = tmp_path.glob(".bundle.retired-*/old/packager.json")
    assert content(kept.parent) == "old"
    monkeypatch.undo()
    # A process with this one's mark is alive: that of a dead one is put back by the next who writes there.
    kept.parent.parent.rename(tmp_path / ".bundle.retired-1-1-00000000-x")
    with pytest.raises(ArtifactError, match="exists already"):
        _publish(target, "new")
    assert content(target) == "old"
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"schema": 1}',
        '{"schema": "1", "files": []}',
        '{"schema": true, "files": []}',
        '{"schema": 1, "files": "inner/file"}',
        '{"schema": 1, "files": [{}]}',
        '{"schema": 1, "files": [3]}',
        '{"schema": 1, "model": {}, "files": {"inner/file": "0"}}',
        "[" * 100_000,
    ],
)
def test_force_asks_for_a_marker_of_the_same_kind(tmp_path: Path, text: str) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "packager.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"it is no bundle of ours \(packager\.json is another file\)"):
        refuse_existing(target, BUNDLE, force=True)


def test_force_does_not_replace_the_other_kind(tmp_path: Path) -> None:
    _publish(tmp_path / "bundle", "old")
    with pytest.raises(ArtifactError, match=r"it is no map of ours \(map\.json is missing\)"):
        refuse_existing(tmp_path / "bundle", MAP, force=True)


@pytest.mark.parametrize("stray", ["thesis.txt", "inner/thesis.txt", "new/thesis.txt", "link"])
def test_force_does_not_replace_what_holds_other_files(tmp_path: Path, stray: str) -> None:
    target = tmp_path / "bundle"
    _publish(target, "old")
    for name in (".DS_Store", "inner/Thumbs.db"):
        (target / name).touch()
    (target / "empty").mkdir()
    refuse_existing(target, BUNDLE, force=True)
    path = target / stray
    path.parent.mkdir(exist_ok=True)
    if stray == "link":
        path.symlink_to(tmp_path)
    else:
        path.touch()
    with pytest.raises(ArtifactError, match=f"it holds {stray}, which is no part of a bundle"):
        refuse_existing(target, BUNDLE, force=True)


def test_an_output_is_never_an_input_nor_in_one_nor_around_one(tmp_path: Path) -> None:
    model = tmp_path / "deep" / "model"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "text.txt").touch()
    for target, inputs, how in (
        (model, [model], "is the input"),
        (tmp_path / "link", [model], "is the input"),
        (model / "out", [tmp_path / "link"], "is inside the input"),
        (tmp_path / "deep", [model], "holds the input"),
        (tmp_path / "text.txt", [model, tmp_path / "text.txt"], "is the input"),
    ):
        with pytest.raises(ArtifactError, match=how):
            refuse_existing(target, BUNDLE, force=True, inputs=inputs)
    refuse_existing(tmp_path / "deep" / "model2", BUNDLE, force=True, inputs=[model, tmp_path / "nowhere"])


@pytest.mark.parametrize("withheld", [0o022, 0o077, 0o002])
def test_everything_published_may_be_read_by_whom_the_umask_lets(tmp_path: Path, withheld: int) -> None:
    before = os.umask(withheld)
    try:
        with published_folder(tmp_path / "bundle", BUNDLE) as staging:
            (staging / "inner").mkdir(mode=0o700)
            (staging / "inner" / "file").touch(mode=0o600)
            (staging / "packager.json").touch(mode=0o755)
    finally:
        os.umask(before)
    for path in [tmp_path / "bundle", *(tmp_path / "bundle").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644) & ~withheld


# Two at once


def test_the_second_writer_is_told_who_is_at_work(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2]); from test_outputs import BUNDLE, published_folder\n"
        "with published_folder(pathlib.Path(sys.argv[1]), BUNDLE) as staging:\n"
        "    print('in', flush=True); sys.stdin.read(); (staging / 'packager.json').touch()"
    )
    target = tmp_path / "bundle"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target), str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "in\n"
        before = names(tmp_path)
        with pytest.raises(OutputError) as caught, reserved(target, BUNDLE, force=True):
            pytest.fail("two at once")
        assert str(caught.value).startswith(f"{target} is being written by another process (pid {first.pid}, since 20")
        assert str(caught.value).endswith("): wait until that has finished, stop it, or choose another name with -o")
        assert names(tmp_path) == before
        with published_folder(tmp_path / "other", BUNDLE):
            pass
        first.communicate("")
    assert names(tmp_path) == ["bundle", "other"]


def test_another_thread_is_another_writer_and_the_same_one_is_not(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            with reserved(tmp_path / "bundle", BUNDLE, force=False):
                found.append("two at once")
        except OutputError as error:
            found.append(str(error))

    with reserved(tmp_path / "bundle", BUNDLE, force=False):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        _publish(tmp_path / "bundle", "inner")
        assert ".bundle.lock" in names(tmp_path)
    assert "is being written by another process" in found[0]
    assert names(tmp_path) == ["bundle"]


def test_the_lock_of_a_killed_process_holds_nobody_up_and_what_it_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib; sys.path.insert(0, sys.argv[2]); from test_outputs import *\n"
        "with published_folder(pathlib.Path(sys.argv[1]), BUNDLE) as staging:\n"
        "    (staging / 'half').touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "bundle"
    subprocess.run([sys.executable, "-c", code, str(target), str(Path(__file__).parent)], check=False)
    (tmp_path / ".bundle.staging-oldstyle").mkdir()
    (tmp_path / ".bundle2.staging-1-1-00000000-x").mkdir()
    assert len(names(tmp_path)) == 4
    _publish(target, "new")
    assert names(tmp_path) == [".bundle2.staging-1-1-00000000-x", "bundle"]


def test_what_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(ArtifactError, match="exists already"), published_folder(target, BUNDLE):
        target.mkdir()
    assert names(tmp_path) == ["bundle"]
    assert names(target) == []


def test_where_there_are_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def without(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", without)
    _publish(tmp_path / "bundle", "one")
    assert content(tmp_path / "bundle") == "one"


# Files


def test_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    for target, force, why in (
        (tmp_path / "input", True, "is the input"),
        (tmp_path / "input" / "file", True, "is inside the input"),
        (tmp_path, True, "is no plain file"),
        (tmp_path / "link", True, "is no plain file"),
        (Path("/dev/null"), True, "is no plain file"),
        (tmp_path / "file", False, "exists already"),
    ):
        inputs = [tmp_path / "input"] if "input" in why else []
        with pytest.raises(ArtifactError, match=why):
            require_file(target, force=force, inputs=inputs)
    require_file(tmp_path / "file", force=True)
    require_file(tmp_path / "file", force=False, ours=lambda path: True)
    require_file(tmp_path / "new" / "file", force=False)
    assert names(tmp_path) == ["file", "input", "link", "new"]
    write_output(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_folders_above_are_made_and_removed_again_when_the_work_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with reserved(tmp_path / "a" / "b" / "bundle", BUNDLE, force=False):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "bundle", tmp_path / "file" / "deep" / "bundle"):
        with pytest.raises(OutputError, match="a file stands where a folder is needed"):
            _publish(target, "new")


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number), str(arguments[0]))

    return refuse


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EROFS, "that file system is read-only"),
        (errno.EACCES, "you may not write there"),
        (errno.ENOSPC, "no space left on the disk of"),
    ],
)
def test_a_place_that_takes_nothing_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, why: str
) -> None:
    target = tmp_path / "deep" / "bundle"
    monkeypatch.setattr(Path, "mkdir", refusing(number))
    with pytest.raises(OutputError, match=why), reserved(target, BUNDLE, force=False):
        pytest.fail("the work began")
    with pytest.raises(OutputError, match=why):
        require_file(target, force=False)
    monkeypatch.undo()
    opened = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: refusing(number)(path) if "lock" in str(path) else opened(path, *rest)
    )
    with pytest.raises(OutputError, match=why), reserved(tmp_path / "bundle", BUNDLE, force=False):
        pytest.fail("the work began")


def test_a_staging_folder_says_whose_it_is(tmp_path: Path) -> None:
    with published_folder(tmp_path / "bundle", BUNDLE) as staging:
        assert staging.name.startswith(f".bundle.staging-{os.getpid()}-")
        assert staging.name.startswith(owned(".bundle.staging-"))
        outputs.sweep(tmp_path, ".bundle.staging-", locked=True)
        assert staging.is_dir()
