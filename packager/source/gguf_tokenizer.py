"""The tokenizer of a GGUF file, with what transformers' conversion loses put back.

transformers builds the vocabulary and merges right but knows only some of the pre-tokenizers, so that digits may no
longer be split as the model was trained, takes no heed of `ignore_merges`, of spaces that a file wants no prefix of,
and labels the class so that the runtime prints `Ġ` for a space. The file says which pre-tokenizer it wants
(`tokenizer.ggml.pre`); the patterns are those the models' own tokenizer.json files carry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from packager.errors import UnsupportedModelError

_GPT4_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O_STYLE = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*ENDING"
    r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_WHOLE, _SINGLE = _GPT4_STYLE.replace("{DIGITS}", "{1,3}"), _GPT4_STYLE.replace("{DIGITS}", "")
_GPT4O = _GPT4O_STYLE.replace("ENDING", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}")
_TEKKEN = _GPT4O_STYLE.replace("ENDING", "").replace("DIGITS", "")
# Names of tokenizer.ggml.pre, as llama.cpp writes them.
_GPT2_NAMES = ("gpt-2", "default", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_LLAMA3_NAMES, "smaug-bpe", "dbrx", "glm4", "chatglm-bpe", "jina-v5-nano"), (_WHOLE,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "kormo", "f2llmv2", "megrez"), (_SINGLE,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK_V3),
}
_IGNORING_MERGES = (*_LLAMA3_NAMES, "tekken")
"""Of these, tokens that are whole words are taken before any merge, and a text begins with the begin token unless the
file says otherwise."""
_LARGE = ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
_UNDERSTOOD = (
    "model",
    "pre",
    *_LARGE,
    *(f"{role}_token_id" for role in ("bos", "eos", "eot", "eom", "unknown", "padding")),
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
)
# Tokens for filling gaps, for pairs and for masks: no text and no conversation of ours puts them anywhere.
_HARMLESS = (
    "token_type_count",
    *(f"{role}_token_id" for role in ("seperator", "separator", "mask", "cls", "prefix", "suffix", "middle")),
    *(f"fim_{role}_token_id" for role in ("pre", "suf", "mid", "pad", "rep", "sep")),
)
_TEMPLATE = "tokenizer.chat_template"


def tokenizer_fields(file: Path) -> dict[str, Any]:
    """The small `tokenizer.*` fields of GGUF `file` by name; lists with an entry for each token are left out.

    UnsupportedModelError names a field that is not understood and may change what is encoded.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    found: dict[str, Any] = {}
    for name, field in reader.fields.items():
        if not name.startswith("tokenizer."):
            continue
        short = name.removeprefix("tokenizer.ggml.")
        if short in _LARGE:
            continue
        value = field.contents()
        # A copy of the Hugging Face file says what the other fields say, and a template's names are not its text.
        known = short in (*_UNDERSTOOD, *_HARMLESS) or name == "tokenizer.huggingface.json" or _TEMPLATE in name
        switched_off = value is False or (short == "remove_extra_whitespaces" and found.get("model") != "t5")
        if not known and not switched_off:
            raise UnsupportedModelError(
                f"the GGUF file has the field {name} ({str(value)[:40]}), which is not understood here and may change "
                "what a text is encoded to: give the model's Hugging Face folder instead, it carries its tokenizer"
            )
        found[name] = value
    return found


def repaired_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of GGUF `file`."""
    fields = tokenizer_fields(file)
    raw = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    spec = json.loads(raw.backend_tokenizer.to_str())
    byte_level = fields.get("tokenizer.ggml.model") == "gpt2"
    kind = str(fields.get("tokenizer.ggml.pre", "default"))
    if byte_level:
        spec["normalizer"] = None
        spec["model"]["byte_fallback"] = False
        spec["model"]["ignore_merges"] = kind in _IGNORING_MERGES
    elif fields.get("tokenizer.ggml.add_space_prefix") is False:
        spec = _without_prefix(spec)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    vocabulary = {number: token for token, number in tokenizer.get_vocab().items()}

    def special(role: str) -> str | None:
        number = fields.get(f"tokenizer.ggml.{role}_token_id")
        return vocabulary.get(int(number)) if number is not None else None

    if byte_level:
        tokenizer.pre_tokenizer = _pre_tokenizer(kind)
        tokenizer.decoder = decoders.ByteLevel()
        opens = fields.get("tokenizer.ggml.add_bos_token", kind in _IGNORING_MERGES)
        tokenizer.post_processor = _post_processor(
            tokenizer,
            special("bos") if opens else None,
            special("eos") if fields.get("tokenizer.ggml.add_eos_token") else None,
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special("bos"),
        eos_token=special("eos"),
        pad_token=special("padding") or special("eos"),
        unk_token=special("unknown"),
        chat_template=_templates(fields, raw.chat_template),
    )


def _templates(fields: Mapping[str, Any], default: Any) -> Any:
    """The file's chat template; by name where it has several."""
    named = {
        name.removeprefix(f"{_TEMPLATE}."): text for name, text in fields.items() if name.startswith(f"{_TEMPLATE}.")
    }
    if not named:
        return default
    return named | ({"default": default} if isinstance(default, str) else {})


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """A SentencePiece tokenizer that puts no space before a text."""

    def keeps(step: Mapping[str, Any]) -> bool:
        return step["type"] not in ("Prepend", "Strip")

    for part, inner in (("normalizer", "normalizers"), ("decoder", "decoders")):
        if spec[part] is not None and inner in spec[part]:
            spec[part][inner] = [step for step in spec[part][inner] if keeps(step)]
    if spec["pre_tokenizer"] is not None and spec["pre_tokenizer"]["type"] == "Metaspace":
        spec["pre_tokenizer"]["prepend_scheme"] = "never"
    return spec


def _post_processor(tokenizer: Tokenizer, begin: str | None, end: str | None) -> Any:
    if begin is None and end is None:
        return processors.ByteLevel(trim_offsets=True)
    around = [token for token in (begin, end) if token is not None]
    return processors.TemplateProcessing(
        single=" ".join(filter(None, (begin, "$A", end))),
        pair=" ".join(filter(None, (begin, "$A", end, begin and f"{begin}:1", "$B:1", end and f"{end}:1"))),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
    )


def _pre_tokenizer(kind: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in _GPT2_NAMES:
        return byte_level
    if kind in _DIGIT_NAMES:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    patterns = _PATTERNS.get(kind)
    if patterns is None:
        raise UnsupportedModelError(
            f"the GGUF file wants pre-tokenizer {kind!r}, which is not known here: give the model's Hugging Face "
            "folder instead, it carries its tokenizer"
        )
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
