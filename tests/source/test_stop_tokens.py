"""Where a model stops: everything that says so, in one list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_level
from transformers import LlamaConfig

from packager.errors import UnsupportedModelError
from packager.source.checkpoint import open_checkpoint
from packager.source.stop_tokens import stop_tokens, with_stop_tokens


def found(eos: Any, generation: Any = None, gguf: dict[str, int] | None = None, *, tokenizer: bool = True) -> list[int]:
    config = LlamaConfig(vocab_size=600)
    config.eos_token_id = eos
    fast = byte_level()
    if not tokenizer:
        fast.eos_token = None
    fields = {f"tokenizer.ggml.{role}_token_id": number for role, number in (gguf or {}).items()}
    return stop_tokens(config, fast, generation={} if generation is None else {"eos_token_id": generation}, gguf=fields)


def test_the_union_of_all_that_say_it() -> None:
    assert found(1) == [1]
    assert found([5, 1]) == [5, 1]
    assert found(1, [5, 1]) == [1, 5]
    assert found(None, 7) == [7, 1]
    assert found(None, gguf={"eos": 2, "eot": 3, "eom": 4}) == [2, 3, 4, 1]
    assert found(None) == [1]
    assert found(-1, tokenizer=True) == [1]
    config = LlamaConfig(vocab_size=600)
    config.eos_token_id = None
    config.text_config = LlamaConfig(eos_token_id=9)
    assert stop_tokens(config, byte_level(), generation={}, gguf={}) == [9, 1]


def test_no_stop_token_and_one_that_is_none() -> None:
    with pytest.raises(UnsupportedModelError, match="names a stop token: nothing would end an answer"):
        found(None, tokenizer=False)
    with pytest.raises(UnsupportedModelError, match=r"generation_config.json names the stop token 'x'"):
        found(1, "x")
    with pytest.raises(UnsupportedModelError, match="names the stop token True"):
        found(1, [True])


def test_a_configuration_that_names_them_all_stays_as_it_is() -> None:
    config = LlamaConfig(vocab_size=600, eos_token_id=1)
    assert with_stop_tokens(config, [1]) is config
    both = with_stop_tokens(config, [1, 5])
    assert (both.eos_token_id, config.eos_token_id) == ([1, 5], 1)
    config.eos_token_id = None
    assert with_stop_tokens(config, [7]).eos_token_id == 7


def test_a_folder_says_it_in_two_files(pico_copy: Path) -> None:
    (pico_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 1]}))
    checkpoint = open_checkpoint(str(pico_copy))
    assert checkpoint.stop_tokens(checkpoint.config(), checkpoint.tokenizer()) == [1, 5]
    path = pico_copy / "config.json"
    config = json.loads(path.read_text())
    del config["eos_token_id"]
    path.write_text(json.dumps(config | {"eos_token_id": None}))
    assert set(checkpoint.stop_tokens(checkpoint.config(), checkpoint.tokenizer())) == {1, 5}
