"""The text of a record: an object with a field of text, or a conversation, which goes through a chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from packager.errors import CalibrationError

Conversation = list[dict[str, str]]
"""Turns in order, each with `role` and `content`."""
Render = Callable[[Conversation], str]
"""A conversation as the model reads it. Raises anything where the template cannot take it."""

TEXT_FIELDS = ("text", "content")
CHAT_FIELDS = ("messages", "conversations", "conversation")
FIELDS = (*TEXT_FIELDS, *CHAT_FIELDS)
WANTED = "a field 'text' or 'content' of text, or 'messages' or 'conversations' of turns"
# ShareGPT's names of who speaks.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


def record_text(record: object, where: str, render: Render) -> str:
    """The text of `record`, "" where its field is empty or null. CalibrationError, placed by `where`, for any other."""
    if isinstance(record, Mapping):
        for field in FIELDS:
            if field in record:
                return field_text(record[field], field, where, render)
    raise CalibrationError(f"{where}: expected a JSON object with {WANTED}, found {_said(record)}")


def field_text(value: object, field: str, where: str, render: Render) -> str:
    """The text that field `field` of a record holds, "" where it is empty or null."""
    if value is None:
        return ""
    if field in TEXT_FIELDS and isinstance(value, str):
        return value
    if field in CHAT_FIELDS and isinstance(value, Sequence) and not isinstance(value, str):
        turns = [_turn(turn, f"{where}: {field}[{number}]") for number, turn in enumerate(value)]
        return _rendered([turn for turn in turns if turn["content"]], where, render)
    wanted = "text" if field in TEXT_FIELDS else "a list of turns"
    raise CalibrationError(f"{where}: field {field!r} holds {_said(value)}: expected {wanted}")


def _turn(turn: object, where: str) -> dict[str, str]:
    """A turn as `role` and `content`, from those names or from ShareGPT's `from` and `value`."""
    if isinstance(turn, Mapping):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, Sequence) and not isinstance(content, str):
            # A turn in parts: pictures and sounds are passed over.
            texts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "".join(text for text in texts if isinstance(text, str))
        if isinstance(role, str) and (content is None or isinstance(content, str)):
            return {"role": _ROLES.get(role, role), "content": content or ""}
    raise CalibrationError(f"{where}: expected a turn with 'role' and 'content' (or 'from' and 'value') of text")


def _rendered(turns: Conversation, where: str, render: Render) -> str:
    if not turns:
        return ""
    try:
        return render(turns)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from None
    except Exception as error:  # a template raises whatever its author wrote
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CalibrationError(
            f"{where}: the model's chat template does not take this conversation ({reason}): repair it or leave it out"
        ) from error


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"the fields {sorted(map(str, value))[:8]}" if value else "an object without fields"
    return {type(None): "null", str: "a string", list: "a list", bool: "a truth value"}.get(type(value), "a number")
