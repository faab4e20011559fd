"""Where a source model says how a conversation is written, and how to say it so that the runtime can.

transformers renders templates with jinja2 and cuts white space around blocks; the runtime has a small engine of its own
that knows part of the language and cuts nothing. What is written for the runtime is, in this order: the template as it
is; the same with its white space spelled out; a plain loop that puts the same text before, between and after the
messages, where that is all the template does. Each is believed only once it rendered the same (source.tokenizer_check).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from packager.errors import UnsupportedModelError
from packager.io.files import read_json

Message = Mapping[str, str]
Conversation = tuple[tuple[Message, ...], bool]
"""Messages, and whether the prompt for an answer follows them."""
_ROLES = ("system", "user", "assistant")
_TEXT = r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_REPLACE = re.compile(rf"\.replace\(\s*{_TEXT}\s*,\s*{_TEXT}\s*\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The template of plain conversations, where it was found, and the names of others that were left out."""

    text: str
    origin: str
    left_out: tuple[str, ...] = ()


def find_template(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> ChatTemplate | None:
    """The source's chat template, None where it has none.

    transformers has read chat_template.jinja, tokenizer_config.json (a text, or a list of named ones) and
    additional_chat_templates/ into `tokenizer`; chat_template.json in `folder` is what it reads for processors alone.
    UnsupportedModelError for a template that is no text.
    """
    found, origin = tokenizer.chat_template, "the tokenizer"
    if found is None and folder is not None and (folder / "chat_template.json").is_file():
        found, origin = read_json(folder / "chat_template.json").get("chat_template"), "chat_template.json"
    if isinstance(found, list):
        found = _named(found, origin)
    left_out: tuple[str, ...] = ()
    if isinstance(found, Mapping):
        left_out = tuple(sorted(str(name) for name in found if name != "default"))
        found = found.get("default")
    if found is None:
        return None
    if not isinstance(found, str):
        raise UnsupportedModelError(
            f"the chat template of {origin} is of type {type(found).__name__}: expected a text, or a list of entries "
            "with name and template"
        )
    return ChatTemplate(text=found, origin=origin, left_out=left_out) if found.strip() else None


def _named(entries: Sequence[Any], origin: str) -> dict[str, Any]:
    try:
        return {str(entry["name"]): entry["template"] for entry in entries}
    except (TypeError, KeyError):
        raise UnsupportedModelError(
            f"the chat templates of {origin} are a list of something else than entries with name and template"
        ) from None


def spelled_out(template: str) -> str:
    """`template` for an engine that cuts no white space: what transformers' engine cuts is gone, and comments are.

    Method calls that have another spelling in the runtime's part of the language are spelled so. UnsupportedModelError
    where jinja2 cannot read the template.
    """
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    marks = {"block_begin": "{%", "block_end": "%}", "variable_begin": "{{", "variable_end": "}}"}
    pieces: list[str] = []
    comment = False
    try:
        for _, kind, value in environment.lex(template):
            if kind == "comment_begin":
                comment = True
            elif kind == "comment_end":
                comment = False
            elif not comment:
                pieces.append(marks.get(kind, value))
    except jinja2.TemplateError as error:
        raise UnsupportedModelError(f"its chat template cannot be read: {error}") from None
    return _REPLACE.sub(r".split(\1) | join(\2)", "".join(pieces))


def plain_loop(render: Callable[[list[Conversation]], list[str | None]]) -> str | None:
    """A loop that writes what `render` writes for conversations of system, user and assistant, or None where the text
    around a message depends on more than its role, the role before it, and where the conversation begins and ends.

    `render` gives None for a conversation that the template refuses.
    """
    texts = _Contents()
    shapes = [shape for shape in _shapes() for _ in (False, True)]
    conversations: list[Conversation] = [
        (texts.messages(shape), prompt) for shape in _shapes() for prompt in (False, True)
    ]
    rendered = render(conversations)
    table: dict[tuple[str, str], str] = {}
    for shape, (messages, prompt), text in zip(shapes, conversations, rendered, strict=True):
        if text is None:
            continue
        parts = _around([message["content"] for message in messages], text)
        if parts is None:
            return None
        ends = ["", *shape, "prompt" if prompt else "end"]
        for key, part in zip(itertools.pairwise(ends), parts, strict=True):
            if table.setdefault(key, part) != part:
                return None
    if ("", "user") not in table:
        return None
    return _loop(table, _trimmed(render))


class _Contents:
    """Messages whose contents occur nowhere else."""

    def messages(self, shape: Sequence[str]) -> tuple[Message, ...]:
        return tuple({"role": role, "content": f"qZ{number}w{role[0]}Xk"} for number, role in enumerate(shape))


def _shapes() -> Iterator[tuple[str, ...]]:
    """Roles in turn, one to seven messages, with a system line and without."""
    for length in range(1, 8):
        turns = tuple(("user", "assistant")[at % 2] for at in range(length))
        yield turns
        yield ("system", *turns)


def _around(contents: Sequence[str], text: str) -> list[str] | None:
    """The text before, between and after the contents; None where one is missing or stands in another order."""
    parts, at = [], 0
    for content in contents:
        begin = text.find(content, at)
        if begin < 0 or text.count(content) != 1:
            return None
        parts.append(text[at:begin])
        at = begin + len(content)
    return [*parts, text[at:]]


def _trimmed(render: Callable[[list[Conversation]], list[str | None]]) -> dict[str, bool]:
    """Of which roles' contents the template takes the white space off both ends."""
    pairs: list[Conversation] = []
    shapes = {"user": ("user",), "assistant": ("user", "assistant", "user"), "system": ("system", "user")}
    for role, shape in shapes.items():
        plain = _Contents().messages(shape)
        spaced = tuple(
            {**message, "content": f" \n{message['content']}\n "} if message["role"] == role else message
            for message in plain
        )
        pairs += [(plain, False), (spaced, False)]
    texts = render(pairs)
    return {role: texts[2 * at] == texts[2 * at + 1] for at, role in enumerate(shapes)}


def _loop(table: Mapping[tuple[str, str], str], trimmed: Mapping[str, bool]) -> str:
    """The loop's text. Every literal is a quoted one, so that no engine's white space rules touch it."""

    def choice(name: str, cases: list[tuple[str, str]], otherwise: str) -> str:
        arms = "".join(
            f"{{% {'elif' if at else 'if'} {name} == '{role}' %}}{{{{ {_quoted(text)} }}}}"
            for at, (role, text) in enumerate(cases)
        )
        return f"{arms}{{% else %}}{{{{ {otherwise} }}}}{{% endif %}}"

    refusal = "raise_exception('this chat template knows no such order of roles')"
    begins = choice("role", [(role, table[("", role)]) for role in _ROLES if ("", role) in table], refusal)
    follows = choice(
        "pair",
        [
            (f"{before} {role}", table[(before, role)])
            for before in _ROLES
            for role in _ROLES
            if (before, role) in table
        ],
        refusal,
    )
    ends = {
        end: choice("last", [(role, table[(role, end)]) for role in _ROLES if (role, end) in table], refusal)
        for end in ("end", "prompt")
    }
    trim = " or ".join(f"role == '{role}'" for role in _ROLES if trimmed.get(role)) or "false"
    return (
        "{% for message in messages %}{% set role = message['role'] %}"
        f"{{% if loop.first %}}{begins}{{% else %}}"
        "{% set pair = messages[loop.index0 - 1]['role'] + ' ' + role %}"
        f"{follows}{{% endif %}}"
        f"{{% if {trim} %}}{{{{ message['content'] | trim }}}}{{% else %}}{{{{ message['content'] }}}}{{% endif %}}"
        "{% endfor %}{% set last = messages[-1]['role'] %}"
        f"{{% if add_generation_prompt %}}{ends['prompt']}{{% else %}}{ends['end']}{{% endif %}}"
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    for character, letter in (("\n", "n"), ("\t", "t"), ("\r", "r")):
        escaped = escaped.replace(character, f"\\{letter}")
    return f"'{escaped}'"
