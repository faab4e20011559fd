"""Plain data into frozen dataclasses, checked on the way: unknown keys, missing keys and wrong types are errors.

And back: `asdict`, or `without_none` for records that leave out what there is not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from packager.errors import ArtifactError

Record = TypeVar("Record")


def from_plain(kind: type[Record], data: Any, where: str) -> Record:
    """A `kind` made of `data` as JSON or TOML give it; `where` locates it in errors.

    Fields may be plain types, literals, dataclasses, tuples of either, dicts, or unions; of a union's kinds, the first
    that the value is of.
    """
    if not isinstance(data, dict):
        raise ArtifactError(f"{where}: expected an object, found {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise ArtifactError(f"{where}: key {unknown[0]!r} is unknown: the file is damaged, or of another version")
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
    return get_type_hints(kind)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        return _value(next((kind for kind in kinds if type(value) is kind), kinds[0]), value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ArtifactError(f"{where} is {value!r}: expected one of {', '.join(map(str, arguments))}")
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
        return {str(key): _value(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if (
        not isinstance(value, hint)
        or (isinstance(value, bool) and hint is not bool)
        or (hint is float and not math.isfinite(value))
    ):
        raise ArtifactError(f"{where} is {value!r}: expected {hint.__name__}")
    return value
