"""Source models: what can be read is read alike, and what cannot is refused in one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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
        "name such as 'owner/name' or 'owner/name@revision', or 'demo'"
    )
    assert refused(missing) == expected
    expected = (
        f"{tmp_path} holds no config.json: expected a Hugging Face model folder with config.json, "
        "*.safetensors and a tokenizer"
    )
    assert refused(tmp_path) == expected
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert refused(tmp_path) == f"{tmp_path} holds no *.safetensors: expected a Hugging Face model folder"
    file = tmp_path / "config.json"
    assert (
        refused(file) == f"model {file} is a file: expected a Hugging Face folder, a .gguf file, a hub name or 'demo'"
    )
    # A relative path that looks like a hub name is tried there, and the error says both.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused("no-such-owner/no-such-model") == (
        "model 'no-such-owner/no-such-model' is no folder here and could not be fetched from the hub: it is not in the "
        "cache here, and the hub cannot be reached: go online, or give a folder"
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
    assert refused(pico_copy, UnsupportedModelError) == (
        f"{pico_copy}: LlamaForCausalLM is a model that brings its own code: code from a model is never run here: give "
        "a model of an architecture that transformers has itself"
    )
    assert not ran.exists()


def test_code_that_transformers_has_taken_in_is_not_needed(picos: Callable[[str], Pico], pico_copy: Path) -> None:
    edit(
        pico_copy,
        auto_map={"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "modeling.LlamaForCausalLM"},
    )
    found = open_checkpoint(str(pico_copy)).load().state_dict()
    assert all(torch.equal(found[key], value) for key, value in picos("llama").model.state_dict().items())
    edit(pico_copy, auto_map={"AutoModelForCausalLM": "modeling.LlamaWithMemoryForCausalLM"})
    assert "brings its own code" in refused(pico_copy, UnsupportedModelError)


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
    assert refused(pico_copy) == (
        f"{pico_copy}: model.layers.0.mlp.gate_proj.weight is of shape (104, 64), but config.json makes it (112, 64): "
        "the configuration and the weights are of different models, download the checkpoint again"
    )


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
    assert refused(pico_copy, UnsupportedModelError) == (
        f"{pico_copy}: model type 'florps' is not known to transformers {transformers.__version__}: upgrade "
        "transformers if it is newer, or give another model"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ", line 1, column 1: not JSON (Expecting value): download it again"),
        ("{", "line 1, column 2: not JSON ("),
        ("[]", ": expected a JSON object, found list: download it again"),
        ("[" * 100_000, "is not readable JSON (maximum recursion depth exceeded"),
        ("{}", "config.json names no model_type, so it is not a model that transformers reads"),
    ],
)
def test_a_configuration_that_is_none(pico_copy: Path, content: str, said: str) -> None:
    (pico_copy / "config.json").write_text(content)
    assert said in refused(pico_copy)


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


def shards(folder: Path, *parts: dict[str, torch.Tensor]) -> dict[str, str]:
    """Put `parts` into shards in place of the one file; the index's tensor → file."""
    (folder / "model.safetensors").unlink()
    names = {}
    for number, part in enumerate(parts, 1):
        file = f"model-0000{number}-of-0000{len(parts)}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into the file, or take out those that are None; their names' dots are written as two underscores."""
    path = folder / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in found.items() if value is not None}, path, metadata={"format": "pt"})


def test_a_tied_configuration_with_a_head_of_its_own_is_untied(pico_copy: Path, tmp_path: Path) -> None:
    tensors = load_file(pico_copy / "model.safetensors")
    change(pico_copy, lm_head__weight=tensors["model.embed_tokens.weight"].clone())
    assert open_checkpoint(str(pico_copy)).config().tie_word_embeddings
    tied = open_checkpoint(str(pico_copy)).load()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight  # type: ignore[union-attr]
    own = torch.randn_like(tensors["model.embed_tokens.weight"])
    change(pico_copy, lm_head__weight=own)
    checkpoint = open_checkpoint(str(pico_copy))
    config = checkpoint.config()
    assert not config.tie_word_embeddings
    model = checkpoint.load()
    assert torch.equal(model.lm_head.weight, own)  # type: ignore[union-attr, arg-type]
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])  # type: ignore[union-attr, arg-type]
    assert not model.config.tie_word_embeddings  # type: ignore[union-attr]
    runtime_tokenizer = checkpoint.runtime_tokenizer(config, checkpoint.tokenizer())
    checkpoint.save_side_files(tmp_path / "out", config, runtime_tokenizer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_missing_is_named(pico_copy: Path) -> None:
    edit(pico_copy, tie_word_embeddings=False)
    assert refused(pico_copy) == (
        f"{pico_copy} lacks lm_head.weight, and its configuration says that the head is not the embedding: set "
        "tie_word_embeddings to true in config.json if it is, or download the checkpoint again"
    )


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "extra.weight", "base_model.model.lora_A.weight"]
)
def test_tensors_that_the_model_does_not_use_are_named(
    pico_copy: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change(pico_copy, **{name.replace(".", "__"): torch.ones(3)})
    assert refused(pico_copy) == (
        f"{pico_copy} holds the tensor {name}, which LlamaForCausalLM as config.json describes it does not use (1 "
        "such): the configuration is of another model, or the file holds parts that are not merged (adapters)"
    )
    assert capfd.readouterr() == ("", "")


def test_constants_in_the_file_are_passed_over(pico_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(
        pico_copy,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        model__layers__0__self_attn__masked_bias=torch.ones(1),
    )
    open_checkpoint(str(pico_copy)).load()
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_of_the_bare_model_is_read(picos: Callable[[str], Pico], pico_copy: Path) -> None:
    tensors = load_file(pico_copy / "model.safetensors")
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()},
        pico_copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    found = open_checkpoint(str(pico_copy)).load().state_dict()
    assert all(torch.equal(found[key], value) for key, value in picos("llama").model.state_dict().items())


def test_whole_numbers_in_place_of_floats(pico_copy: Path) -> None:
    change(pico_copy, model__layers__0__mlp__up_proj__weight=torch.ones((104, 64), dtype=torch.int8))
    assert refused(pico_copy) == (
        f"{pico_copy}: model.layers.0.mlp.up_proj.weight is stored as I8, expected floats: give the unquantised "
        "original"
    )


def test_a_tensor_in_two_shards(pico_copy: Path) -> None:
    tensors = load_file(pico_copy / "model.safetensors")
    shards(pico_copy, tensors, {"model.norm.weight": tensors["model.norm.weight"]})
    assert refused(pico_copy) == (
        f"{pico_copy}: the tensor model.norm.weight is in both model-00001-of-00002.safetensors and "
        "model-00002-of-00002.safetensors: the files are of different checkpoints, download them again"
    )


def test_an_index_that_says_what_is_not_so(pico_copy: Path) -> None:
    tensors = load_file(pico_copy / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    names = shards(pico_copy, tensors, {"model.norm.weight": norm})
    index = pico_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names | {"model.norm.weight": names["model.embed_tokens.weight"]}}))
    # The second file is not named at all now.
    assert "says that model.norm.weight is in model-00001-of-00002.safetensors, which does not hold it" in refused(
        pico_copy
    )
    (pico_copy / "model.safetensors").write_bytes((pico_copy / "model-00001-of-00002.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": names}))
    assert refused(pico_copy) == (
        f"{pico_copy} holds both model.safetensors and an index of 2 other files (model-00001-of-00002.safetensors …): "
        "one of them is left over, remove it"
    )


def test_shards_cut_short(pico_copy: Path) -> None:
    tensors = load_file(pico_copy / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    shards(pico_copy, {"model.norm.weight": norm}, tensors)
    path = pico_copy / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refused(pico_copy).startswith(f"{path} is cut short: ")


def test_weights_under_another_name(pico_copy: Path) -> None:
    (pico_copy / "model.safetensors").rename(pico_copy / "llama.safetensors")
    assert refused(pico_copy) == (
        f"{pico_copy} holds llama.safetensors but neither model.safetensors nor model.safetensors.index.json: rename "
        "it to that"
    )


def test_pickles_beside_safetensors_do_not_matter(pico_copy: Path) -> None:
    (pico_copy / "pytorch_model.bin").write_bytes(b"not read")
    (pico_copy / "consolidated.safetensors").write_bytes(b"not read either")
    checkpoint = open_checkpoint(str(pico_copy))
    checkpoint.load()
    assert [file.name for file in checkpoint.files] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_may_not_be_read(pico_copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pico_copy / name
    path.chmod(0)
    if os.geteuid() == 0:  # who may read everything: let the system say what it would say to another
        plain = Path.open

        def guarded(self: Path, *arguments: Any, **named: Any) -> Any:
            if self == path:
                raise PermissionError(13, "Permission denied", str(self))
            return plain(self, *arguments, **named)

        monkeypatch.setattr(Path, "open", guarded)
    assert refused(pico_copy) == (
        f"{path} may not be read (its permissions are ----------): give yourself the right to (chmod u+r) or run as "
        "its owner"
    )


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("vocab_size", "384", "16,777,216"),
        ("vocab_size", -1, "16,777,216"),
        ("vocab_size", 10**18, "16,777,216"),
        ("vocab_size", 384.0, "16,777,216"),
        ("hidden_size", True, "1,048,576"),
        ("hidden_size", 0, "1,048,576"),
        ("num_hidden_layers", 10**9, "1,000"),
        ("num_attention_heads", [4], "16,384"),
        ("max_position_embeddings", {}, "2,147,483,648"),
    ],
)
def test_sizes_that_are_none(pico_copy: Path, key: str, value: Any, limit: str) -> None:
    edit(pico_copy, **{key: value})
    assert refused(pico_copy) == (
        f"{pico_copy / 'config.json'}: {key} is {json.dumps(value)}: expected a whole number from 1 to {limit}: "
        "download it again"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": "linear"}, "transformers cannot"),
        ({"num_attention_heads": 5}, "transformers cannot"),
        ({"hidden_act": "no-such"}, "transformers cannot make the model that its configuration describes"),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes": expected true or false'),
        ({"_attn_implementation": "someone/kernel"}, "code on the hub, which is never run here"),
        ({"attn_implementation": {"": "someone/kernel"}}, "code on the hub, which is never run here"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights is not supported"),
    ],
)
def test_settings_that_do_not_fit(pico_copy: Path, changes: dict[str, Any], said: str) -> None:
    edit(pico_copy, **changes)
    assert said in refused(pico_copy)


def test_kernels_that_its_authors_used_are_not_needed(pico_copy: Path) -> None:
    edit(pico_copy, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")
    open_checkpoint(str(pico_copy)).load()


def test_a_configuration_without_architectures_is_its_types(pico_copy: Path) -> None:
    edit(pico_copy, architectures=None)
    assert open_checkpoint(str(pico_copy)).config().architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("beside", [True, False])
def test_adapters_are_merged_first(pico_copy: Path, beside: bool) -> None:
    (pico_copy / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    save_file({"lora": torch.ones(1)}, pico_copy / "adapter_model.safetensors")
    if not beside:
        (pico_copy / "config.json").unlink()
        (pico_copy / "model.safetensors").unlink()
    assert refused(pico_copy, UnsupportedModelError) == (
        f"{pico_copy} holds an adapter of owner/base (adapter_config.json): merge it into its base first (peft: "
        "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)) and give the merged folder"
        + ("; to pack the base without it, take the adapter's files away" if beside else "")
    )


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model_index.json", "is a diffusers pipeline"),
        ("modules.json", "is a sentence-transformers model"),
        ("config_sentence_transformers.json", "is a sentence-transformers model"),
        ("map.json", "is a score map of this packager"),
        ("packager.json", "is a bundle of this packager"),
    ],
)
def test_folders_of_other_things(pico_copy: Path, file: str, said: str) -> None:
    (pico_copy / file).write_text("{}")
    assert said in refused(pico_copy)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.safetensors", "is one file of weights: give the folder that it is in"),
        ("a.bin", "is a pickle"),
        ("a.onnx", "is a graph that was exported already"),
        ("a.tar", "is an archive"),
        ("a", "is a file: expected"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"some bytes")
    assert said in refused(tmp_path / name)


def test_convolutions_and_stacked_experts_are_named(tmp_path: Path, tokenizer: Any) -> None:
    config = transformers.Lfm2Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = refused(tmp_path, UnsupportedModelError)
    assert "model.layers.0.conv.conv.weight of Lfm2ForCausalLM is of shape (64, 1, 3)" in text


@pytest.mark.parametrize("cached", [True, False])
def test_a_folder_of_links_is_named_after_its_repository(pico_copy: Path, tmp_path: Path, cached: bool) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / ("models--owner--some--model" if cached else "elsewhere") / "snapshots" / commit
    folder.mkdir(parents=True)
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(pico_copy.iterdir())):
        file.rename(blobs / str(number))
        (folder / file.name).symlink_to(Path("../../blobs") / str(number))
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.name == ("some--model" if cached else commit)
    checkpoint.load()


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["extra"]),
        lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<|pad|>"}),
        lambda tokenizer: (
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]}),
            setattr(tokenizer, "chat_template", tokenizer.chat_template + "<|turn|>"),
        ),
    ],
)
def test_tokens_beyond_the_embedding_are_named(pico_copy: Path, change: Callable[[Any], Any]) -> None:
    tokenizer = open_checkpoint(str(pico_copy)).tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(pico_copy)
    token = tokenizer.convert_ids_to_tokens(384)
    assert refused(pico_copy) == (
        f"{pico_copy}: its tokenizer gives {token!r} the id 384, but its embedding has 384 rows (1 such tokens): the "
        "tokenizer is of another model, or the embedding was not resized after tokens were added"
    )


def test_a_token_that_nothing_leads_to_may_lie_beyond(pico_copy: Path) -> None:
    tokenizer = open_checkpoint(str(pico_copy)).tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(pico_copy)
    assert len(open_checkpoint(str(pico_copy)).tokenizer()) == 385
