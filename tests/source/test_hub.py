"""Hub names: read apart, fetched small files first, and every failure said in one line. Nothing here asks the hub."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import Pico
from huggingface_hub import errors

from packager.errors import ModelError, UnsupportedModelError
from packager.source.checkpoint import open_checkpoint
from packager.source.hub import cached_name, is_hub_name, repository_name


class Hub:
    """Stands for the hub: gives `folder` as what snapshot_download fetched, and remembers what was asked."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision))
        self.cache.mkdir(exist_ok=True)
        for file in self.folder.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, self.cache / file.name)
        return str(self.cache)


@pytest.fixture
def hub(pico_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(pico_copy, tmp_path / "0123abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", found)
    return found


@pytest.mark.parametrize(
    ("source", "revision"),
    [
        ("owner/name", None),
        ("owner/name@v1.0", "v1.0"),
        ("owner/name@refs/pr/3", "refs/pr/3"),
        ("owner/name@" + "a" * 40, "a" * 40),
    ],
)
def test_a_name_takes_a_revision(hub: Hub, source: str, revision: str | None) -> None:
    for file in ("pytorch_model.bin", "consolidated.safetensors", "model.onnx", "picture.png"):
        (hub.folder / file).write_bytes(b"large and of no use")
    checkpoint = open_checkpoint(source)
    assert (checkpoint.name, checkpoint.source) == ("name", source)
    assert set(hub.asked) == {("owner/name", revision)}
    names = {file.name for file in hub.cache.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "model.onnx", "picture.png"}
    checkpoint.load()


def test_of_shards_those_that_the_index_names_are_fetched(hub: Hub) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "part.safetensors")
    (hub.folder / "other.safetensors").write_bytes(b"of no use")
    index = {"weight_map": dict.fromkeys(_tensors(hub.folder / "part.safetensors"), "part.safetensors")}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in open_checkpoint("owner/name").files] == ["part.safetensors"]
    assert not (hub.cache / "other.safetensors").exists()


def _tensors(path: Path) -> list[str]:
    from packager.io.safetensors_ranges import read_header

    return list(read_header(path)[0])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"model_type": "bert", "architectures": ["BertModel"]}),
        ("adapter_config.json", {}),
        ("modules.json", {}),
        ("model_index.json", {}),
    ],
)
def test_what_cannot_be_packed_is_not_fetched(hub: Hub, file: str, content: Any) -> None:
    (hub.folder / file).write_text(json.dumps(content))
    with pytest.raises(UnsupportedModelError):
        open_checkpoint("owner/name")
    assert not (hub.cache / "model.safetensors").exists()


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/owner/name"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            lambda: errors.GatedRepoError("gated\n\nlong", response=response(403)),
            "it is gated: accept its terms at https://huggingface.co/owner/name, then log in (hf auth login)",
        ),
        (
            lambda: errors.RepositoryNotFoundError("404\nlong", response=response(404)),
            "there is no such model, or it is private: check the name, or log in (hf auth login)",
        ),
        (
            lambda: errors.RevisionNotFoundError("404\nlong", response=response(404)),
            "it has no branch, tag or commit 'v9'",
        ),
        (
            lambda: errors.LocalEntryNotFoundError("Cannot find\nan appropriate"),
            "it is not in the cache here, and the hub cannot be reached: go online, or give a folder",
        ),
        (
            lambda: errors.OfflineModeIsEnabled("offline"),
            "it is not in the cache here, and the hub cannot be reached: go online, or give a folder",
        ),
        (lambda: OSError("No space left\non device"), "No space left on device"),
    ],
)
def test_failures_are_one_line(error: Callable[[], Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError) as caught:
        open_checkpoint("owner/name@v9")
    assert str(caught.value) == (
        f"model 'owner/name@v9' is no folder here and could not be fetched from the hub: {said}"
    )


@pytest.mark.parametrize(
    "source",
    [
        "name",
        "a/b/c",
        "./name/x",
        "../a",
        "/a/b",
        "~/a",
        "a/b@",
        "a/b@../c",
        "owner/na me",
        "a/b@v1\n",
        "a\\b/c",
        "a/..",
        "-a/b",
    ],
)
def test_what_is_no_name_is_not_asked_for(source: str, hub: Hub) -> None:
    assert not is_hub_name(source)
    with pytest.raises(ModelError, match="does not exist"):
        open_checkpoint(source)
    assert not hub.asked


def test_a_folder_comes_before_the_hub(
    picos: Callable[[str], Pico], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(picos("llama").folder, tmp_path / "owner" / "name@v1")
    assert open_checkpoint("owner/name@v1").name == "name@v1"
    assert not hub.asked


def test_names() -> None:
    assert repository_name("owner/some.name@main") == "some.name"
    assert cached_name(Path("/c/models--owner--a--b/snapshots/0123")) == "a--b"
    assert cached_name(Path("/c/models--gpt2/snapshots/0123")) == "gpt2"
    assert cached_name(Path("/c/datasets--owner--a/snapshots/0123")) == "0123"
    assert cached_name(Path("/c/some-model")) == "some-model"
