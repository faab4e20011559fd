"""Source models: what can be read is read alike, and what cannot is refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from safetensors.torch import load_file, save_file

from packager.errors import ModelError, UnsupportedModelError
from packager.source.checkpoint import open_checkpoint, vectors


def refused(source: Path | str, kind: type[ModelError] = ModelError) -> str:
    """Open and load `source` as scoring does; the one line of the error it must end in."""

    def read() -> None:
        checkpoint = open_checkpoint(str(source))
        checkpoint.config()
        checkpoint.tokenizer()
        checkpoint.load()

    with pytest.raises(kind) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    return str(caught.value)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_as_it_was_saved(pico: Pico) -> None:
    checkpoint = open_checkpoint(str(pico.folder))
    assert checkpoint.name == f"pico-{pico.name}"
    assert checkpoint.config().architectures == [type(pico.model).__name__]
    loaded = checkpoint.load()
    assert not loaded.training
    expected = pico.model.state_dict()
    found = loaded.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    text = "Some words, 42 numbers and naïve accents"
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer()(text)["input_ids"]) == text
    assert all(tensor.dtype == torch.float32 and tensor.dim() == 1 for _, tensor in vectors(loaded))


def test_half_precision_weights_become_float32(pico_copy: Path) -> None:
    path = pico_copy / "model.safetensors"
    save_file(
        {key: value.to(torch.bfloat16) for key, value in load_file(path).items()}, path, metadata={"format": "pt"}
    )
    edit(pico_copy, dtype="bfloat16")
    model = open_checkpoint(str(pico_copy)).load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_identity_is_of_the_weights(picos: Callable[[str], Pico], pico_copy: Path) -> None:
    original = open_checkpoint(str(picos("llama").folder)).sha256()
    assert open_checkpoint(str(pico_copy)).sha256() == original
    tensors = load_file(pico_copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, pico_copy / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(pico_copy)).sha256() != original


def test_a_sharded_checkpoint_is_read(picos: Callable[[str], Pico], pico_copy: Path) -> None:
    tensors = load_file(pico_copy / "model.safetensors")
    (pico_copy / "model.safetensors").unlink()
    names, parts = sorted(tensors), {}
    for number, keys in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, pico_copy / file, metadata={"format": "pt"})
        parts |= dict.fromkeys(keys, file)
    (pico_copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    checkpoint = open_checkpoint(str(pico_copy))
    assert len(checkpoint.files) == 2
    found = checkpoint.load().state_dict()
    assert all(torch.equal(found[key], value) for key, value in picos("llama").model.state_dict().items())
    (pico_copy / "model-00002-of-00002.safetensors").unlink()
    assert (
        refused(pico_copy)
        == f"{pico_copy} lacks model-00002-of-00002.safetensors, which its index names (1 of 2 files missing)"
    )


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["b"]}}',
    ],
)
def test_an_index_without_a_map_of_files(pico_copy: Path, index: str) -> None:
    path = pico_copy / "model.safetensors.index.json"
    path.write_text(index)
    assert refused(pico_copy) == f"{path} has no weight_map of file names: the checkpoint is damaged, download it again"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors"])
def test_an_index_that_names_files_elsewhere(pico_copy: Path, name: str) -> None:
    path = pico_copy / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    assert refused(pico_copy) == (
        f"{path} names {name!r}, which is not a safetensors file in its folder: the checkpoint "
        "is damaged, download it again"
    )


def test_missing_and_empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "no"
    expected = (
        f"model folder {missing} does not exist: expected a Hugging Face folder, a .gguf file, a hub "
        "name such as 'owner/name', or 'demo'"
    )
    assert refused(missing) == expected
    expected = (
        f"{tmp_path} holds no config.json: expected a Hugging Face model folder with config.json, "
        "*.safetensors and a tokenizer"
    )
    assert refused(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path) == f"{tmp_path} holds no *.safetensors: expected a Hugging Face model folder"
    file = tmp_path / "config.json"
    assert (
        refused(file) == f"model {file} is a file: expected a Hugging Face folder, a .gguf file, a hub name or 'demo'"
    )
    # A relative path that looks like a hub name is tried there, and the error says both.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused("no-such-owner/no-such-model").startswith(
        "model 'no-such-owner/no-such-model' is no folder here and could not be fetched from the hub: "
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_not_read(pico_copy: Path, name: str) -> None:
    (pico_copy / "model.safetensors").rename(pico_copy / name)
    assert refused(pico_copy) == (
        f"{pico_copy} holds only pickled weights ({name}), which can run code when read: convert "
        "them to safetensors first"
    )


def test_code_beside_the_weights_is_not_run(pico_copy: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (pico_copy / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit(
        pico_copy,
        model_type="evil",
        auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"},
    )
    refused(pico_copy, UnsupportedModelError)
    assert not ran.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(pico_copy: Path, value: float) -> None:
    path = pico_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    expected = (
        f"{pico_copy}: model.layers.1.mlp.up_proj.weight holds values that are not finite (NaN or "
        "infinity): the checkpoint is damaged"
    )
    assert refused(pico_copy) == expected


def test_truncated_weights(pico_copy: Path) -> None:
    path = pico_copy / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        text = refused(pico_copy)
        assert text.startswith(f"{path} is ")
        assert text.endswith(": download the checkpoint again")


def test_weights_of_another_shape(pico_copy: Path) -> None:
    edit(pico_copy, intermediate_size=112)
    assert refused(pico_copy).startswith(f"{pico_copy} cannot be loaded: ")


def test_a_tensor_that_is_missing_is_named(pico_copy: Path) -> None:
    path = pico_copy / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    expected = (
        f"{pico_copy} lacks the tensor model.layers.1.mlp.up_proj.weight (1 missing): the checkpoint "
        "is incomplete, download it again"
    )
    assert refused(pico_copy) == expected


def test_an_unknown_architecture_is_named(pico_copy: Path) -> None:
    edit(pico_copy, model_type="florps", architectures=["FlorpsForCausalLM"])
    text = refused(pico_copy, UnsupportedModelError)
    assert text.startswith(f"{pico_copy}: transformers cannot read its configuration: ")
    assert "florps" in text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_configuration_that_is_none(pico_copy: Path, content: str) -> None:
    (pico_copy / "config.json").write_text(content)
    assert refused(pico_copy, UnsupportedModelError).startswith(
        f"{pico_copy}: transformers cannot read its configuration: "
    )


def test_a_folder_without_tokenizer(pico_copy: Path) -> None:
    for path in pico_copy.glob("tokenizer*"):
        path.unlink()
    assert refused(pico_copy).startswith(f"{pico_copy}: its tokenizer cannot be read: ")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 3}'])
def test_a_damaged_tokenizer(pico_copy: Path, content: str) -> None:
    (pico_copy / "tokenizer.json").write_text(content)
    assert refused(pico_copy).startswith(f"{pico_copy}: its tokenizer cannot be read: ")


def test_files_called_gguf_that_are_not(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    assert refused(path) == f"model file {path} does not exist"
    path.write_bytes(b"GGML and so on")
    assert refused(path) == f"{path} is not a GGUF file: its first four bytes are not 'GGUF'"
    for content in (
        b"GGUF",
        b"GGUF" + b"\xff" * 60,
        b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2,
    ):
        path.write_bytes(content)
        assert refused(path).startswith(f"{path}")


def test_side_files_travel(picos: Callable[[str], Pico], tmp_path: Path) -> None:
    source = shutil.copytree(picos("llama").folder, tmp_path / "model")
    (source / "LICENSE").write_text("Do as you like.")
    (source / "secrets.txt").write_text("not ours to copy")
    checkpoint = open_checkpoint(str(source))
    config = checkpoint.config()
    checkpoint.save_side_files(tmp_path / "out", config, checkpoint.runtime_tokenizer(config, checkpoint.tokenizer()))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    } <= names
    assert "secrets.txt" not in names
    assert not any(name.endswith(".safetensors") for name in names)
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
