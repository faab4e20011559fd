"""Before anything is scored: does the runtime encode, decode, render and stop as the source model does?

The source's tokenizer is transformers' reading of the model; the runtime's is opened from the files that a bundle would
hold (source.tokenizer_files), in a child process, without any model. What differs is written in a form that the runtime
can (a template that it renders alike, token ids put around a text), or the model is refused with the difference named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from packager.errors import PackagerError, RuntimeCheckError, UnsupportedModelError
from packager.io.files import dump_json
from packager.io.leftovers import scratch_folder
from packager.runtime.tokenizer_probe import ask, first_line
from packager.source.chat_template import ChatTemplate, Conversation, plain_loop, spelled_out
from packager.source.tokenizer_files import TOKENIZER_FILE, TokenizerFiles, steps, tokenizer_files

TEXTS = (
    "Plain English, with punctuation; and a dash - or two.",
    "Numbers: 0 7 42 1969 3.14159 1,000,000 2026-11-21 0xFF",
    "Accents: naïve café Ångström Žižek résumé, and in two marks: e\u0301 a\u030a",
    "日本語と中文 和 한국어 ภาษาไทย हिन्दी العربية",
    "Emoji: 🚀 👩‍👩‍👧 🇨🇭 ✅",
    "Runs   of    white\t\tspace\n\n\nand lines\r\n end ",
    "code: for (int i = 0; i < n; ++i) { a[i] += b[i]; }\n\tif (x_y == 'z') { return; }",
    " a space before",
    "  two before",
    "spaces after   ",
    "it's WE'RE I'LL they've DON'T x's",
    "ABCdef McDonald iPhone HTTPServer snake_case __init__",
    "“quoted” —dash… don’t 12345678 a1b2 #h @g",
    "\n\n x\n",
    "a",
)
RARE = ("a ½ b", "step ② of Ⅳ")
"""Numerals beyond the digits, which the runtime does not cut apart where a tokenizer does. A difference is noted."""
_CONTENTS = (
    "You answer in one line.",
    "What is 2 + 2? Give the number, naïvely: 日本 🚀",
    "It is 4.\n\n- four\n- vier",
    "And 3 * 12?\n",
    "36, I'd say",
)
_MOST_ADDED = 32  # added tokens tried, those of the template and the stops first


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerReport:
    """What was compared and found alike; `rewritten` says what a bundle holds otherwise than the source, and `known`
    where the runtime still differs: in texts that no conversation of the model's template holds."""

    encoded: int
    decoded: int
    rendered: int
    rewritten: tuple[str, ...] = ()
    known: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeTokenizer:
    """A source's tokenizer as a bundle will hold it, and the report on it."""

    files: TokenizerFiles
    report: TokenizerReport


def check_runtime_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    config: PretrainedConfig,
    *,
    source_file: Path | None = None,
    without_template: bool = False,
) -> RuntimeTokenizer:
    """The files for the runtime of `tokenizer`, after it encoded, decoded and rendered as the source does.

    `source_file` is the source's own tokenizer.json, if it has one; `without_template` leaves the chat template out.
    UnsupportedModelError names what the runtime cannot, and what to do.
    """
    _refuse_ids_beyond(tokenizer, config, source_file)
    if without_template:
        template = None
    files = tokenizer_files(tokenizer, template.text if template else None, source_file, rows=_rows(config))
    with scratch_folder() as folder:
        config.save_pretrained(folder)
        (folder / "genai_config.json").write_text(dump_json(_GENAI), encoding="utf-8")
        files, encoded, decoded, known = _tokenized(folder, tokenizer, template, files)
        rendered = 0
        if template is not None:
            files, rendered = _rendered(folder, tokenizer, template, files)
        files.write(folder)
        _refuse_other_reading(folder, tokenizer)
    if template is not None and template.left_out:
        known = (*known, f"its chat templates {', '.join(template.left_out)} are left out: a bundle has one")
    report = TokenizerReport(encoded=encoded, decoded=decoded, rendered=rendered, rewritten=files.changes, known=known)
    return RuntimeTokenizer(files=files, report=report)


# The least that the runtime asks for before it opens a tokenizer.
_GENAI = {
    "model": {
        "type": "llama",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "vocab_size": 1,
        "context_length": 1,
        "decoder": {"filename": "none.onnx"},
    },
    "search": {"max_length": 1},
}


def _rows(config: PretrainedConfig) -> int:
    return int(config.get_text_config().vocab_size)


def _refuse_ids_beyond(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, source_file: Path | None) -> None:
    """Every token of the source's own needs a row of the embedding; what a class of transformers adds to it does not,
    and is left out of what is written."""
    rows = _rows(config)
    vocabulary = tokenizer.get_vocab()
    if source_file is not None and source_file.is_file():
        own = Tokenizer.from_file(str(source_file)).get_vocab(with_added_tokens=True)
        vocabulary = {token: number for token, number in vocabulary.items() if token in own or number < rows}
    token = max(vocabulary, key=lambda name: vocabulary[name], default=None)
    if token is not None and vocabulary[token] >= rows:
        raise UnsupportedModelError(
            f"its tokenizer has the token {token!r} with id {vocabulary[token]}, the model has {rows} rows of "
            f"embeddings: the ids go to {rows - 1}; tokenizer and model do not belong together, or the embeddings were "
            "not resized after tokens were added"
        )
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, role, None)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number >= rows:
                raise UnsupportedModelError(
                    f"the configuration's {role} is {number}, the model has {rows} rows of embeddings: the ids go to "
                    f"{rows - 1}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """One text: `bare` with the special tokens of encoding. `token` is the added token it is about, if any; of a `rare`
    text a difference is noted.
    """

    text: str
    bare: bool
    token: str | None = None
    rare: bool = False


def _cases(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> Iterator[_Case]:
    for bare in (True, False):
        for text in TEXTS:
            yield _Case(text=text, bare=bare)
    for text in RARE:
        yield _Case(text=text, bare=False, rare=True)
    for token in tokens:
        for text in (
            f"a{token}b",
            f"{token}a {token} b",
            f"a {token}",
            f"a{token}{token}",
            f"{token}\na",
            f"a \n{token}  \n b",
        ):
            yield _Case(text=text, bare=False, token=token)


def _tokens_in_use(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> set[str]:
    """Added tokens that a conversation holds: the template's and those that begin and end a text."""
    text = template.text if template else ""
    used = {name for name in tokenizer.get_added_vocab() if name in text}
    return used | {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token is not None}


def _tokenized(
    folder: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, files: TokenizerFiles
) -> tuple[TokenizerFiles, int, int, tuple[str, ...]]:
    """Compare encoding and decoding. Returns the files, perhaps with rules for the special tokens, the number of texts
    encoded and decoded alike, and the differences that no conversation meets."""
    used = _tokens_in_use(tokenizer, template)
    added = sorted(tokenizer.get_added_vocab(), key=lambda name: (name not in used, name))[:_MOST_ADDED]
    cases = list(_cases(tokenizer, added))
    expected = [tokenizer(case.text, add_special_tokens=case.bare)["input_ids"] for case in cases]
    decodable = [
        (case.text, ids)
        for case, ids in zip(cases, expected, strict=True)
        if not case.bare and case.token is None and not case.rare and ids
    ]
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for _, ids in decodable
    ]
    items: list[dict[str, Any]] = [{"text": case.text, "bare": case.bare} for case in cases]
    items += [{"ids": ids} for _, ids in decodable]
    answers = _answers(folder, files, items)
    if any(case.bare and found != ids for case, found, ids in zip(cases, answers, expected, strict=False)):
        around = _around(tokenizer)
        files = files.with_rules("the special tokens around a bare text are put there by id", around=around)
        answers = _answers(folder, files, items)
    known, rare = [], []
    for case, found, ids in zip(cases, answers, expected, strict=False):
        if found == ids:
            continue
        if case.rare:
            rare.append(case.text)
            continue
        if case.token is not None and (case.token not in used or _spaced(case)):
            known.append(case.token)
            continue
        raise UnsupportedModelError(_encoded_otherwise(tokenizer, files, case.text, found, ids))
    for (text, ids), found, wanted in zip(decodable, answers[len(cases) :], texts, strict=True):
        if found != wanted:
            raise UnsupportedModelError(
                f"the runtime decodes {text!r} otherwise than the source's tokenizer: as {_shown(found)} in place of "
                f"{wanted!r} ({len(ids)} tokens); take a model whose tokenizer it can read"
            )
    names = sorted(set(known))
    words = [f"white space beside {', '.join(names[:5])} in a text of the user's own may be cut otherwise"] * bool(
        names
    )
    words += [f"numerals beyond the digits are cut otherwise: {', '.join(map(repr, rare))}"] * bool(rare)
    return files, len(cases) - len(known) - len(rare), len(texts), tuple(words)


def _spaced(case: _Case) -> bool:
    """Whether white space stands beside the token: a rendered conversation is compared as a whole for that."""
    return case.token is not None and any(
        pair in case.text for pair in (f" {case.token}", f"{case.token} ", f"\n{case.token}", f"{case.token}\n")
    )


def _around(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids that encoding puts before and after a text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    outer = tokenizer("a", add_special_tokens=True)["input_ids"]
    for at in range(len(outer) - len(inner) + 1):
        if outer[at : at + len(inner)] == inner:
            return [outer[:at], outer[at + len(inner) :]]
    return [[], []]


def _answers(folder: Path, files: TokenizerFiles, items: list[dict[str, Any]]) -> list[Any]:
    files.write(folder)
    request = {"task": "tokenize", "folder": str(folder), "rules": dict(files.rules), "items": items}
    try:
        return ask(request)
    except RuntimeCheckError as error:
        raise UnsupportedModelError(
            f"the runtime cannot open its tokenizer ({_parts(files)}), which {first_line(str(error))}; take a model "
            "with another byte-level or SentencePiece BPE tokenizer"
        ) from None


def _parts(files: TokenizerFiles) -> str:
    """The kinds of the tokenizer's normaliser and pre-tokenizer, for people."""
    spec = json.loads(files.texts[TOKENIZER_FILE])
    named = {
        name: ", ".join(step["type"] for step in steps(spec.get(name))) for name in ("normalizer", "pre_tokenizer")
    }
    return "; ".join(f"{name} {kinds}" for name, kinds in named.items() if kinds) or "BPE"


def _encoded_otherwise(
    tokenizer: PreTrainedTokenizerBase, files: TokenizerFiles, text: str, found: Any, ids: list[int]
) -> str:
    if isinstance(found, list):
        at = next((at for at, pair in enumerate(zip(found, ids, strict=False)) if pair[0] != pair[1]), 0)
        here = [tokenizer.convert_ids_to_tokens(numbers[at : at + 4]) for numbers in (found, ids)]
        what = f"into {here[0]} in place of {here[1]} from token {at} on"
    else:
        what = f"not at all ({_shown(found)})"
    return (
        f"the runtime's tokenizer does not do what the source's does ({_parts(files)}): it encodes {text!r} {what}; "
        "take a model whose tokenizer it can read"
    )


def _shown(found: Any) -> str:
    return first_line(str(found["error"])) if isinstance(found, dict) else repr(found)


def _conversations() -> list[Conversation]:
    """Four turns with a system line and without, and shorter ones, each with and without the prompt for an answer."""

    def messages(roles: str) -> tuple[dict[str, str], ...]:
        names = {"s": "system", "u": "user", "a": "assistant"}
        contents = _CONTENTS if roles[0] == "s" else _CONTENTS[1:]
        return tuple({"role": names[role], "content": text} for role, text in zip(roles, contents, strict=False))

    return [
        (messages(roles), prompt) for roles in ("u", "uau", "uaua", "su", "suau", "suaua") for prompt in (True, False)
    ]


def _rendered(
    folder: Path, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, files: TokenizerFiles
) -> tuple[TokenizerFiles, int]:
    """Compare rendering, by text and by ids, with the template as it is and then with others in its place."""

    def render(conversations: list[Conversation]) -> list[str | None]:
        answers = _by_transformers(template.text, tokenizer, conversations)
        return [answer if isinstance(answer, str) else None for answer in answers]

    conversations = _conversations()
    wanted = _by_transformers(template.text, tokenizer, conversations)
    if not isinstance(wanted[0], str):
        raise UnsupportedModelError(
            f"its chat template fails in transformers itself: {_shown(wanted[0])}; go on without it with "
            "--no-chat-template"
        )
    pairs = [(pair, text) for pair, text in zip(conversations, wanted, strict=True) if isinstance(text, str)]
    reason = ""
    candidates: list[tuple[str, TokenizerFiles]] = [("", files)]
    spelled = spelled_out(template.text)
    change = "the runtime's chat template has its white space spelled out"
    candidates.append((change, files.with_module(change, chat_template=spelled)))
    tried = 0
    while tried < len(candidates):
        _, candidate = candidates[tried]
        difference = _difference(folder, tokenizer, candidate, pairs)
        if difference is None:
            return candidate, len(pairs)
        reason = reason or difference
        tried += 1
        if tried == len(candidates) == 2 and (loop := plain_loop(render)) is not None:
            change = "the runtime's chat template is a plain loop that writes the same for messages of text"
            candidates.append((change, files.with_module(change, chat_template=loop)))
    raise UnsupportedModelError(
        f"the runtime cannot render its chat template as transformers does: {reason}; go on without it with "
        "--no-chat-template, then the bundle answers bare text"
    )


def _by_transformers(
    template: str, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation]
) -> list[Any]:
    """What transformers renders, {"error": text} where the template refuses."""
    variables = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    request = {"task": "jinja", "template": template, "variables": variables, "items": _items(conversations)}
    try:
        return ask(request)
    except RuntimeCheckError as error:
        raise UnsupportedModelError(
            f"its chat template {first_line(str(error))} when transformers rendered it: go on without it with "
            "--no-chat-template"
        ) from None


def _items(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    return [
        {"messages": [dict(message) for message in messages], "add_generation_prompt": prompt}
        for messages, prompt in conversations
    ]


def _difference(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    files: TokenizerFiles,
    pairs: Sequence[tuple[Conversation, str]],
) -> str | None:
    """In words, how the runtime renders or encodes otherwise; None where it does not."""
    files.write(folder)
    request = {"task": "chat", "folder": str(folder), "items": _items([pair for pair, _ in pairs])}
    try:
        found = ask(request)
    except RuntimeCheckError as error:
        return f"it {first_line(str(error))}"
    for text, (_, wanted) in zip(found, pairs, strict=True):
        if not isinstance(text, str):
            return _shown(text)
        if text != wanted:
            at = next((at for at in range(min(len(text), len(wanted))) if text[at] != wanted[at]), len(text))
            return f"it writes {text[at : at + 24]!r} in place of {wanted[at : at + 24]!r} after {wanted[:at][-24:]!r}"
    texts = [text for _, text in pairs]
    answers = _answers(folder, files, [{"text": text, "bare": False} for text in texts])
    for text, ids in zip(texts, answers, strict=True):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != expected:
            return _encoded_otherwise(tokenizer, files, text, ids, expected)
    return None


def _refuse_other_reading(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers reads the written files as it reads the source's."""
    try:
        written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        same = all(
            written(text)["input_ids"] == tokenizer(text)["input_ids"]
            and written.decode(tokenizer(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
            for text in TEXTS
        )
    except PackagerError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UnsupportedModelError(
            f"its tokenizer cannot be written for a bundle: {first_line(str(error))}"
        ) from error
    if not same:
        raise UnsupportedModelError(
            f"its tokenizer ({type(tokenizer).__name__}) does things that its tokenizer.json does not say: save the "
            "model with a plain fast tokenizer first"
        )
