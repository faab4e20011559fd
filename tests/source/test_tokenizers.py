"""Tokenizers: what the runtime encodes and decodes is what transformers does, or the model is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_tokenizers import END, KINDS, VOCABULARY, byte_level, sentencepiece
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from packager.errors import UnsupportedModelError
from packager.runtime import tokenizer_probe
from packager.runtime.device_check import TEXT_FILE, decode, encode, strip, text_rules
from packager.source.tokenizer_check import RuntimeTokenizer, check_runtime_tokenizer
from packager.source.tokenizer_files import CONFIG_FILE, MODULE_FILE, TOKENIZER_FILE


def checked(tokenizer: PreTrainedTokenizerFast, **config: object) -> RuntimeTokenizer:
    return check_runtime_tokenizer(tokenizer, None, LlamaConfig(**({"vocab_size": VOCABULARY} | config)))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_the_sources_or_refused(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    tokenizer = kind.make()
    if kind.refused is not None:
        with pytest.raises(UnsupportedModelError, match=kind.refused):
            checked(tokenizer)
        return
    made = checked(tokenizer)
    assert made.report.known == ()
    made.files.write(tmp_path)
    # Texts that the check did not see, by the words that a bundle's own check.py uses.
    texts = ["Zwölf Boxkämpfer: 98 × 7!", "x = {'a': [1, 2]}\n\n\treturn  x", "  two", "a\u00a0b ﬁn 漢字かな 🇨🇭"]
    texts += [f"{tokenizer.eos_token}{tokenizer.eos_token}", f"{tokenizer.eos_token}Zwölf"]
    answers = tokenizer_probe.ask(
        {
            "task": "tokenize",
            "folder": str(with_genai(tmp_path)),
            "rules": text_rules(tmp_path),
            "items": [{"text": text, "bare": bare} for text in texts for bare in (True, False)],
        }
    )
    expected = [tokenizer(text, add_special_tokens=bare)["input_ids"] for text in texts for bare in (True, False)]
    assert answers == expected
    written = AutoTokenizer.from_pretrained(tmp_path)
    assert [written(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


def with_genai(folder: Path) -> Path:
    model = {"type": "llama", "context_length": 1, "decoder": {"filename": "x"}, "eos_token_id": 0, "vocab_size": 1}
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 1}}))
    return folder


def test_the_files_open_anywhere(tmp_path: Path) -> None:
    tokenizer = byte_level()
    checked(tokenizer).files.write(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    # optimum and older versions of transformers know no other class, and the graph has no such input.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["eos_token"] == END
    assert not (tmp_path / MODULE_FILE).exists()
    assert not (tmp_path / TEXT_FILE).exists()


def test_a_sources_own_file_is_taken_as_it_is(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    own = (tmp_path / TOKENIZER_FILE).read_text() + "\n"
    (tmp_path / TOKENIZER_FILE).write_text(own)
    made = check_runtime_tokenizer(
        tokenizer, None, LlamaConfig(vocab_size=VOCABULARY), source_file=tmp_path / TOKENIZER_FILE
    )
    assert made.files.texts[TOKENIZER_FILE] == own


def test_a_class_that_rebuilds_the_pipeline_is_written_as_it_builds_it(tmp_path: Path) -> None:
    sentencepiece().save_pretrained(tmp_path)
    for legacy, prefix in ((True, "always"), (False, "first")):
        config = json.loads((tmp_path / CONFIG_FILE).read_text())
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        made = checked(tokenizer)
        spec = json.loads(made.files.texts[TOKENIZER_FILE])
        assert spec["pre_tokenizer"]["prepend_scheme"] == prefix
        assert tokenizer("a")["input_ids"][0] == 1


def test_ids_beyond_the_embedding() -> None:
    tokenizer = byte_level(added=(AddedToken("<late>", special=True),))
    rows = len(tokenizer) - 1
    with pytest.raises(UnsupportedModelError, match=rf"'<late>' with id {rows}, the model has {rows} rows"):
        checked(tokenizer, vocab_size=rows)
    with pytest.raises(UnsupportedModelError, match="eos_token_id is 9000"):
        checked(byte_level(), eos_token_id=[1, 9000])


def test_an_added_token_that_the_runtime_cuts_otherwise_is_told(tmp_path: Path) -> None:
    odd = AddedToken("<odd>", single_word=True, special=True)
    made = checked(byte_level(added=(odd,)))
    assert len(made.report.known) == 1
    assert "<odd>" in made.report.known[0]


def test_a_tokenizer_without_a_file_form_is_refused() -> None:
    class Slow(PreTrainedTokenizerFast):
        backend_tokenizer = None  # type: ignore[assignment]

    tokenizer = byte_level()
    tokenizer.__class__ = Slow
    with pytest.raises(UnsupportedModelError, match=r"\(Slow\) has no tokenizer.json form"):
        checked(tokenizer)


class Recorded:
    """A tokenizer that gives back what it was asked."""

    def __init__(self) -> None:
        self.options: dict[str, str] = {}
        self.texts: list[str] = []

    def update_options(self, **options: str) -> None:
        self.options |= options

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [len(text)]

    def decode(self, ids: Iterator[int]) -> str:
        return "  x"


def test_rules_around_the_runtime() -> None:
    tokenizer = Recorded()
    assert encode(tokenizer, "e\u0301", {"normalize": "NFC"}) == [1]
    assert tokenizer.options["add_special_tokens"] == "true"
    assert encode(tokenizer, "ab", {"around": [[7], [8, 9]]}) == [7, 2, 8, 9]
    assert tokenizer.options["add_special_tokens"] == "false"
    assert encode(tokenizer, "ab", {"around": [[7], [8, 9]]}, bare=False) == [2]
    first = {"leading_space": "add", "tokens": ["<s>"]}
    every = {"leading_space": "drop", "tokens": ["<s>", "<s>s"]}
    tokenizer.texts.clear()
    for text in ("a", " a", "<s>a"):
        encode(tokenizer, text, first)
    for text in ("a", "  a", "<s> a", "a <s>s  b<s>"):
        encode(tokenizer, text, every)
    encode(tokenizer, "a \n<m> <n>", {"absorb_space_before": ["<m>", "<n>"]})
    assert tokenizer.texts == [" a", " a", "<s>a", "a", " a", "<s>a", "a <s>s b<s>", "a<m><n>"]
    assert [decode(tokenizer, [1], {"strip_decoded_spaces": most}) for most in (0, 1, 9, -1)] == ["  x", " x", "x", "x"]
    assert strip("   ", {"strip_decoded_spaces": 2}) == " "


def test_what_a_child_cannot_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokenizer_probe, "SECONDS", 4.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    checked(byte_level()).files.write(with_genai(tmp_path))
    (tmp_path / "chat_template.jinja").write_text(endless)
    with pytest.raises(tokenizer_probe.RuntimeCheckError, match="took longer than 4 s and was stopped"):
        tokenizer_probe.render_chat(tmp_path, [{"role": "user", "content": "a"}])
