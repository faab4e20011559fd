"""Plain data into frozen dataclasses, checked on the way: unknown keys, missing keys, wrong types and values out of
range are errors.

Whatever a file says, a number is finite and at most LARGEST either way, and a text has no control characters, which a
terminal would obey. A field narrows that by its annotation: `Count`, `Positive`, `Share`, or free text.

And back: `asdict`, or `without_none` for records that leave out what there is not.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import reprlib
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from packager.errors import ArtifactError

Record = TypeVar("Record")
LARGEST = 1 << 53
"""Whole numbers up to here are exact in every reader of JSON."""
MOST_TEXT = 1 << 20
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal obeys; line ends and tabs are none."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Within:
    """The least and the most that a number may be."""

    least: float = -LARGEST
    most: float = LARGEST


class FreeText:
    """What a person or a model said: any characters."""


Count = Annotated[int, Within(least=0)]
Positive = Annotated[int, Within(least=1)]
Dimension = Annotated[int, Within(least=1, most=1 << 31)]
"""Of a tensor, or of a text in tokens."""
Layers = Annotated[int, Within(least=0, most=10_000)]
Amount = Annotated[float, Within(least=0)]
Said = Annotated[str, FreeText()]
_ANY = Within()


def from_plain(kind: type[Record], data: Any, where: str) -> Record:
    """A `kind` made of `data` as JSON or TOML give it; `where` locates it in errors.

    Fields may be plain types, literals, dataclasses, tuples of either, dicts, or unions; of a union's kinds, the first
    that the value is of.
    """
    if not isinstance(data, dict):
        raise ArtifactError(f"{where}: expected an object, found {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise ArtifactError(f"{where}: key {shown(unknown[0])} is unknown: the file is damaged, or of another version")
    hints = _hints(kind)  # type: ignore[arg-type]
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ArtifactError(f"{where}: key {name!r} is missing: the file is damaged, or of another version")
    return kind(**values)


def without_none(record: Any) -> dict[str, Any]:
    """A record as plain data, without the fields that are None."""
    return {key: value for key, value in dataclasses.asdict(record).items() if value is not None}


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Types of the fields, looked up once for each kind: a map has hundreds of the same."""
    return get_type_hints(kind, include_extras=True)


def shown(value: object) -> str:
    """A value in an error, cut short: it may be deep, or have millions of digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"a huge {type(value).__name__}"


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _scalar(arguments[0], value, where, arguments[1])
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        return _value(next((kind for kind in kinds if type(value) is kind), kinds[0]), value, where)
    if origin is Literal:
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in arguments:
            raise ArtifactError(f"{where} is {shown(value)}: expected one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ArtifactError(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(_value(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: expected an object, found {type(value).__name__}")
        return {
            _scalar(str, key, f"{where}: a key", _ANY): _value(arguments[1], item, f"{where}[{shown(key)}]")
            for key, item in value.items()
        }
    return _scalar(hint, value, where, _ANY)


def _scalar(kind: type[Any], value: Any, where: str, bound: Within | FreeText) -> Any:
    """A number, text or truth value of `kind` within `bound`."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN compares false with everything. Too large a whole number cannot be made a float, so this comes first.
    fits = not numeric or (-LARGEST <= value <= LARGEST if kind is int else abs(value) < float("inf"))
    if kind is float and fits and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if not fits or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ArtifactError(f"{where} is {shown(value)}: expected {kind.__name__}")
    if numeric and isinstance(bound, Within) and not bound.least <= value <= bound.most:
        raise ArtifactError(f"{where} is {shown(value)}: expected {bound.least:g} to {bound.most:g}")
    if isinstance(value, str):
        _require_text(value, where, free=isinstance(bound, FreeText))
    return value


def _require_text(value: str, where: str, *, free: bool) -> None:
    if len(value) > MOST_TEXT:
        raise ArtifactError(f"{where} has {len(value)} characters: expected at most {MOST_TEXT}")
    if not free and (found := CONTROL.search(value)) is not None:
        raise ArtifactError(f"{where} holds the control character {found.group()!a}: expected text")
