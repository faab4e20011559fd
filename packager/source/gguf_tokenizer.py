"""The tokenizer of a GGUF file, with what transformers' conversion loses put back.

transformers builds the vocabulary and merges right but replaces the pre-tokenizer by a plain byte-level one, so
digits are no longer split as the model was trained, and it labels the class so that the runtime prints `Ġ` for a
space. The file says which pre-tokenizer it wants (`tokenizer.ggml.pre`); the patterns are those the models' own
tokenizer.json files carry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packager.errors import UnsupportedModelError

_GPT4_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def repaired_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of GGUF `file`. Vocabularies that are not byte-level BPE are returned as transformers reads
    them."""
    raw = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    fields = _fields(file)
    if fields.get("tokenizer.ggml.model") != "gpt2":
        whole: PreTrainedTokenizerBase = raw
        return whole
    spec = json.loads(raw.backend_tokenizer.to_str())
    spec["normalizer"] = None
    spec["model"]["byte_fallback"] = False
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.pre_tokenizer = _pre_tokenizer(str(fields.get("tokenizer.ggml.pre", "default")))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}

    def special(role: str) -> str | None:
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        return vocabulary.get(int(number)) if number is not None else None

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding") or special("eos"),
        unk_token=special("unknown"),
        chat_template=raw.chat_template,
    )


def _pre_tokenizer(kind: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in ("gpt-2", "default"):
        return byte_level
    if kind in ("smollm", "starcoder", "refact", "command-r"):
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    digits = {
        "llama-bpe": "{1,3}",
        "llama3": "{1,3}",
        "smaug-bpe": "{1,3}",
        "dbrx": "{1,3}",
        "qwen2": "",
        "deepseek-r1-qwen": "",
    }.get(kind)
    if digits is None:
        raise UnsupportedModelError(
            f"the GGUF file wants pre-tokenizer {kind!r}, which is not known here: give the model's Hugging Face "
            f"folder instead, it carries its tokenizer"
        )
    pattern = Regex(_GPT4_STYLE.replace("{DIGITS}", digits))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    wanted = (
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        *(f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "padding", "unknown")),
    )
    return {name: field.contents() for name in wanted if (field := reader.get_field(name)) is not None}
