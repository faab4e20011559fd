"""A tokenizer's files in the form that the runtime reads, meaning what transformers means by them.

The runtime (onnxruntime-extensions inside onnxruntime-genai 0.18) reads tokenizer.json with an eye for few things. What
it passes over is said to it another way, such that transformers goes on reading the same:

    tokenizer.json         the tokenizer as transformers builds it from whatever the source has (classes of transformers
                           replace the pipeline in the file), with no-op steps where the runtime needs a mark
    tokenizer_config.json  few keys, and a class that every version of transformers opens without rebuilding
    tokenizer_module.json  read by the runtime alone, over tokenizer_config.json: its class, a template of its own
    runtime_text.json      what remains to be done to a text before and after the runtime: runtime.device_check does it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from packager.errors import UnsupportedModelError
from packager.runtime.device_check import TEXT_FILE

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MODULE_FILE = "tokenizer_module.json"
TEMPLATE_FILE = "chat_template.jinja"
_SPACE = "▁"
# The runtime's one class whose SentencePiece models merge across everything, as theirs do; the others cut the text by
# a pattern of Llama's first.
_WHOLE_TEXT_CLASS = "GemmaTokenizer"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEPT = ("padding_side", "truncation_side")
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_READABLE = "a byte-level or SentencePiece BPE tokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """What a bundle holds of a tokenizer: `texts` by file name, `module` and `rules` (files where not empty).

    `changes` says in words what was written otherwise than the source has it.
    """

    texts: Mapping[str, str]
    module: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    def with_module(self, change: str, **values: Any) -> TokenizerFiles:
        """With `values` for the runtime alone, and the words for it."""
        return replace(self, module={**self.module, **values}, changes=(*self.changes, change))

    def with_rules(self, change: str, **values: Any) -> TokenizerFiles:
        """With `values` in the rules around the runtime, and the words for it."""
        return replace(self, rules={**self.rules, **values}, changes=(*self.changes, change))

    def write(self, folder: Path) -> None:
        """All files into `folder`."""
        files = dict(self.texts)
        for name, content in ((MODULE_FILE, self.module), (TEXT_FILE, self.rules)):
            if content:
                files[name] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def tokenizer_files(
    tokenizer: PreTrainedTokenizerBase, template: str | None, source_file: Path | None = None, *, rows: int
) -> TokenizerFiles:
    """The files of `tokenizer` with chat template `template`, for a model with `rows` rows of embeddings.
    `source_file`, the source's own tokenizer.json, is taken byte for byte where it means the same.

    UnsupportedModelError names a kind of tokenizer that the runtime has no form for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"its tokenizer ({type(tokenizer).__name__}) has no tokenizer.json form: expected {_READABLE}; save the "
            "model with its fast tokenizer first"
        )
    spec: dict[str, Any] = json.loads(backend.to_str())
    # What a call pads or cuts is not the model's, and is left out by save_pretrained as well.
    spec["padding"] = spec["truncation"] = None
    # A class of transformers adds its usual tokens to a vocabulary that lacks them: they have no row.
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < rows]
    kind = str(spec["model"].get("type"))
    if kind != "BPE":
        raise UnsupportedModelError(_no_form(kind))
    form = _sentencepiece(spec) if _is_sentencepiece(spec) else _byte_level(spec)
    form = _normal_form(spec, form)
    form = _absorbing(spec, form)
    text = json.dumps(form.spec, ensure_ascii=False, indent=2)
    if source_file is not None and source_file.is_file():
        own = source_file.read_text(encoding="utf-8")
        if json.loads(own) == form.spec:
            text = own
    config = _config(tokenizer, template, rows)
    texts = {TOKENIZER_FILE: text, CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
    if template is not None:
        texts[TEMPLATE_FILE] = template
    return TokenizerFiles(texts=texts, module=form.module, rules=form.rules, changes=tuple(form.changes))


def _no_form(kind: str) -> str:
    found = {
        "Unigram": "a SentencePiece Unigram tokenizer, which the runtime cuts otherwise around special tokens, spaces "
        "and bytes",
        "WordPiece": "a WordPiece tokenizer, which the runtime does not read",
        "WordLevel": "a word-level tokenizer, which the runtime does not read",
    }.get(kind, f"a tokenizer of kind {kind!r}, which the runtime does not read")
    return f"its tokenizer is {found}: expected {_READABLE}; take a model of the same size that has one"


@dataclass(kw_only=True, slots=True)
class _Form:
    """A tokenizer.json in the making, and what stands beside it."""

    spec: dict[str, Any]
    module: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


def steps(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer, decoder or post-processor, nested sequences laid flat."""
    if part is None:
        return []
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        if part.get("type") == "Sequence" and key in part:
            return [inner for step in part[key] for inner in steps(step)]
    return [dict(part)]


def _is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Whether words are marked by a raised space, and not by byte-level letters."""
    if any(step["type"] == "ByteLevel" for step in steps(spec["pre_tokenizer"]) + steps(spec["decoder"])):
        return False
    return any(
        step["type"] == "Metaspace" or (step["type"] == "Replace" and _SPACE in json.dumps(step, ensure_ascii=False))
        for step in steps(spec["decoder"]) + steps(spec["normalizer"]) + steps(spec["pre_tokenizer"])
    )


def _sentencepiece(spec: dict[str, Any]) -> _Form:
    """The form of a SentencePiece BPE. The runtime knows it by a decoder that turns the mark into a space, and puts a
    space before every piece of text where it sees one stripped there."""
    form = _Form(spec=spec, module={"tokenizer_class": _WHOLE_TEXT_CLASS})
    decoding = steps(spec["decoder"])
    stripped = max(
        (step["start"] for step in decoding if step["type"] == "Strip" and step["content"] == " "), default=0
    )
    if any(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in decoding):
        stripped = -1  # all that its first token begins with
    if not any(step["type"] == "Replace" and step["pattern"].get("String") == _SPACE for step in decoding):
        # After the others it finds nothing left to replace; the runtime asks only whether it is there.
        decoding.append({"type": "Replace", "pattern": {"String": _SPACE}, "content": " "})
        form.changes.append("its decoder carries a mark for the runtime")
    prefix = _prefix(spec)
    strips = [step for step in decoding if step["type"] == "Strip"]
    if prefix in ("always", "every-bare"):
        if not strips:
            decoding.append({"type": "Strip", "content": " ", "start": 0, "stop": 0})
    elif strips:
        # A sequence within the sequence hides the strip from the runtime, and means the same.
        decoding = [{"type": "Sequence", "decoders": [step]} if step in strips else step for step in decoding]
    if prefix == "every-bare":
        form.rules["leading_space"] = "drop"
    elif prefix == "first":
        form.rules["leading_space"] = "add"
    if "leading_space" in form.rules:
        form.rules["tokens"] = [token["content"] for token in spec["added_tokens"]]
    if decoding != steps(spec["decoder"]):
        spec["decoder"] = {"type": "Sequence", "decoders": decoding}
    if stripped:
        form.rules["strip_decoded_spaces"] = stripped
    return form


def _prefix(spec: Mapping[str, Any]) -> str:
    """Where the tokenizer puts a space of its own: "always" (before every piece between added tokens), "every-bare"
    (the same, but not before a space), "first" (only where the text begins, and not before a space) or "never"."""
    if any(step["type"] == "Prepend" and step["prepend"] in (_SPACE, " ") for step in steps(spec["normalizer"])):
        return "always"
    for step in steps(spec["pre_tokenizer"]):
        if step["type"] == "Metaspace":
            return {"always": "every-bare", "first": "first"}.get(step.get("prepend_scheme", "always"), "never")
    return "never"


def _byte_level(spec: dict[str, Any]) -> _Form:
    """The form of a byte-level BPE: the runtime reads patterns and merges; a space put before the text it does not."""
    form = _Form(spec=spec)
    cutting = steps(spec["pre_tokenizer"])
    levels = [step for step in cutting if step["type"] == "ByteLevel"]
    if any(step.get("add_prefix_space") for step in levels):
        form.rules["leading_space"] = "add"
        form.rules["tokens"] = [token["content"] for token in spec["added_tokens"]]
    if len(cutting) == len(levels) and levels and not any(step.get("use_regex", True) for step in levels):
        # Without any pattern the runtime takes GPT-2's. This one cuts nothing.
        whole = {"type": "Split", "pattern": {"Regex": "[\\s\\S]+"}, "behavior": "Isolated", "invert": False}
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [whole, *cutting]}
        form.changes.append("that it cuts nothing is spelled out")
    return form


def _normal_form(spec: Mapping[str, Any], form: _Form) -> _Form:
    """The runtime normalises nothing: Unicode's normal forms are left to what calls it."""
    for step in steps(spec["normalizer"]):
        if step["type"] in _NORMAL_FORMS:
            form.rules["normalize"] = step["type"]
    return form


def _absorbing(spec: Mapping[str, Any], form: _Form) -> _Form:
    """Added tokens that swallow the space before them: the runtime knows only the space after."""
    if tokens := [token["content"] for token in spec["added_tokens"] if token.get("lstrip")]:
        form.rules["absorb_space_before"] = tokens
    return form


def _config(tokenizer: PreTrainedTokenizerBase, template: str | None, rows: int) -> dict[str, Any]:
    """tokenizer_config.json. Nothing in it makes a version of transformers build the pipeline anew: the begin and end
    tokens are in tokenizer.json's post-processor, and the class is one that takes that file as it is."""
    config: dict[str, Any] = {}
    for role in _ROLES:
        token, number = getattr(tokenizer, role, None), getattr(tokenizer, f"{role}_id", None)
        if token is not None and number is not None and number < rows:
            config[role] = str(token)
    others = [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or []]
    if others:
        config["additional_special_tokens"] = others
    for key in _KEPT:
        if (value := getattr(tokenizer, key, None)) is not None:
            config[key] = value
    config["clean_up_tokenization_spaces"] = False
    # Older versions of transformers and optimum know this name and no newer one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    length = tokenizer.model_max_length
    if isinstance(length, int) and 0 < length < 1 << 40:
        config["model_max_length"] = length
    if template is not None:
        # transformers.js and older versions of transformers look here and not for the file.
        config["chat_template"] = template
    return config
