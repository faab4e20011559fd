"""The words a GGUF file has for its tokenizer: each is honoured, known to be harmless, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import BEGIN, END, KINDS, VOCABULARY, byte_level, sentencepiece
from transformers import LlamaConfig, PreTrainedTokenizerFast

from packager.errors import UnsupportedModelError
from packager.source.chat_template import find_template
from packager.source.gguf_tokenizer import repaired_tokenizer, tokenizer_fields
from packager.source.stop_tokens import stop_tokens
from packager.source.tokenizer_check import check_runtime_tokenizer

gguf = pytest.importorskip("gguf")
CONTROL, NORMAL, BYTE = 3, 1, 6
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def written(folder: Path, tokenizer: PreTrainedTokenizerFast, model: str, **fields: Any) -> Path:
    """A GGUF file of a tokenizer alone, with `fields` of tokenizer.ggml."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(spec["model"]["vocab"], key=lambda token: int(spec["model"]["vocab"][token]))
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types(
        [CONTROL if token in special else BYTE if token.startswith("<0x") else NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_block_count(1)
    writer.add_context_length(64)
    for name, value in fields.items():
        key = name.replace("__", ".") if name.startswith("tokenizer__") else f"tokenizer.ggml.{name}"
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "x.gguf"


ROLES = {"bos_token_id": 0, "eos_token_id": 1}


@pytest.mark.parametrize(
    ("fields", "around"),
    [
        ({"pre": "gpt-2"}, (None, None)),
        ({"pre": "gpt-2", "add_bos_token": True}, (0, None)),
        ({"pre": "qwen2", "add_eos_token": True}, (None, 1)),
        ({"pre": "smollm", "add_bos_token": True, "add_eos_token": True}, (0, 1)),
        ({"pre": "llama-bpe"}, (0, None)),  # llama.cpp's own default for these names
        ({"pre": "llama-bpe", "add_bos_token": False}, (None, None)),
        ({"pre": "tekken"}, (0, None)),
        ({"pre": "deepseek-v3", "add_bos_token": True}, (0, None)),
    ],
)
def test_the_tokens_around_a_text(fields: dict[str, Any], around: tuple[Any, Any], tmp_path: Path) -> None:
    source = KINDS["digits" if fields["pre"] == "smollm" else "gpt2"].make()
    tokenizer = repaired_tokenizer(written(tmp_path, source, "gpt2", **ROLES, **fields))
    bare, full = (tokenizer("abc 12", add_special_tokens=special)["input_ids"] for special in (False, True))
    begin, end = around
    assert full == [*([] if begin is None else [begin]), *bare, *([] if end is None else [end])]
    assert tokenizer(f"{BEGIN}a{END}", add_special_tokens=False)["input_ids"][::2] == [0, 1]
    assert check_runtime_tokenizer(tokenizer, None, LlamaConfig(vocab_size=VOCABULARY)).report.encoded > 0


@pytest.mark.parametrize("prefix", [True, False])
def test_the_space_before_a_text(prefix: bool, tmp_path: Path) -> None:
    file = written(tmp_path, sentencepiece(), "llama", bos_token_id=1, eos_token_id=2, add_space_prefix=prefix)
    tokenizer = repaired_tokenizer(file)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"])[:2] == ["<s>", "▁the" if prefix else "the"]
    assert tokenizer.decode(tokenizer("the")["input_ids"], skip_special_tokens=True) == "the"
    made = check_runtime_tokenizer(tokenizer, None, LlamaConfig(vocab_size=VOCABULARY))
    assert made.files.rules.get("leading_space") == ("add" if prefix else None)


def test_ends_of_turn_and_message_stop(tmp_path: Path) -> None:
    file = written(tmp_path, byte_level(), "gpt2", **ROLES, eot_token_id=7, eom_token_id=8)
    fields = tokenizer_fields(file)
    config = LlamaConfig(vocab_size=VOCABULARY)
    config.eos_token_id = None
    assert stop_tokens(config, repaired_tokenizer(file), generation={}, gguf=fields) == [1, 7, 8]


def test_templates_by_name(tmp_path: Path) -> None:
    more = {"tokenizer__chat_template": PLAIN, "tokenizer__chat_template__tool_use": "x"}
    found = find_template(repaired_tokenizer(written(tmp_path, byte_level(), "gpt2", **ROLES, **more)), None)
    assert found is not None
    assert (found.text, found.left_out) == (PLAIN, ("tool_use",))


@pytest.mark.parametrize(
    "fields", [{"fim_pre_token_id": 3}, {"mask_token_id": 3}, {"add_sep_token": False}, {"token_type_count": 2}]
)
def test_harmless_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    assert repaired_tokenizer(written(tmp_path, byte_level(), "gpt2", **ROLES, **fields)) is not None


@pytest.mark.parametrize("fields", [{"add_sep_token": True}, {"lowercase": True}, {"tokenizer__rwkv__world": "x"}])
def test_fields_that_are_not_understood(fields: dict[str, Any], tmp_path: Path) -> None:
    file = written(tmp_path, byte_level(), "gpt2", **ROLES, **fields)
    with pytest.raises(UnsupportedModelError, match="which is not understood here and may change"):
        repaired_tokenizer(file)


def test_a_pre_tokenizer_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="wants pre-tokenizer 'florps'"):
        repaired_tokenizer(written(tmp_path, byte_level(), "gpt2", **ROLES, pre="florps"))
