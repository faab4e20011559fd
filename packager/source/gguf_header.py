"""The head of a GGUF file: its fields and its table of tensors, read in a moment and held against the file's size.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf library's reader makes an array of
every token of a vocabulary, which takes seconds, and checks no bounds.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import ModelError, UnsupportedModelError

_MAGIC = b"GGUF"
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 20
_MOST_DIMENSIONS = 8
_KEPT_VALUES = 4096  # of a list of numbers; longer ones, and lists of words, belong to the tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """A tensor's shape (rows first), ggml type by number, and the bytes it lies in, `start` to `stop` of the file."""

    shape: tuple[int, ...]
    type: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """`fields` without long lists, and the tensors by name, in the file's order."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """Reads values one after another; ModelError where the file ends before one."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place, self.order = path, data, 4, "<"

    def take(self, length: int) -> int:
        start = self.place
        if not 0 <= length <= len(self.data) - start:
            raise cut_short(self.path, len(self.data))
        self.place += length
        return start

    def number(self, code: str) -> Any:
        layout = struct.Struct(self.order + code)
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        if kind not in _FORMATS:
            raise _damaged(self.path, f"a field is of kind {kind}")
        return self.number(_FORMATS[kind])

    def array(self) -> list[Any] | None:
        """The values of a list; None of one that is long, or not of numbers."""
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            for _ in range(count):
                self.take(self.number("Q"))
            return None
        if kind not in _FORMATS:
            raise _damaged(self.path, f"a list is of kind {kind}")
        start = self.take(count * struct.calcsize("<" + _FORMATS[kind]))
        if count > _KEPT_VALUES:
            return None
        return list(struct.unpack_from(f"{self.order}{count}{_FORMATS[kind]}", self.data, start))


def cut_short(path: Path, size: int) -> ModelError:
    """The error for a file that ends before its head says."""
    return ModelError(f"{path} is cut short: it has {size} bytes, fewer than its head says: download it again")


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} is damaged ({reason}): download it again")


def read_gguf_header(path: Path) -> GgufHeader:
    """Fields and tensors of a GGUF file. ModelError when it is none, damaged or cut short; UnsupportedModelError for
    a tensor type that the gguf library does not know."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(path, data))


def _read(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    version = cursor.number("I")
    if not version & 0xFFFF:
        cursor.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        raise UnsupportedModelError(
            f"{path} is of GGUF version {version}: expected 2 or 3: make it again with llama.cpp"
        )
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, field_count) > _MOST_ENTRIES:
        raise _damaged(path, f"{tensor_count} tensors and {field_count} fields")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = cursor.text()
        if name in fields:
            raise _damaged(path, f"the field {name[:80]!r} stands twice")
        fields[name] = cursor.value(cursor.number("I"))
    entries = dict(_entries(cursor, tensor_count))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise _damaged(path, f"an alignment of {alignment}")
    data = -(-cursor.place // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        start, length = data + offset, _length(path, name, shape, kind)
        if start + length > len(cursor.data):
            raise cut_short(path, len(cursor.data))
        tensors[name] = GgufTensor(shape=shape, type=kind, start=start, stop=start + length)
    return GgufHeader(fields=fields, tensors=tensors)


def _entries(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[tuple[int, ...], int, int]]]:
    names = set()
    for _ in range(count):
        name = cursor.text()
        if name in names:
            raise _damaged(cursor.path, f"the tensor {name[:80]!r} stands twice")
        names.add(name)
        dimensions = cursor.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _damaged(cursor.path, f"a tensor of {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        yield name, (tuple(reversed(shape)), cursor.number("I"), cursor.number("Q"))


def _length(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor: rows of whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise UnsupportedModelError(
            f"{path}: {name[:80]} is of type {kind}, which the installed gguf library does not know: upgrade it (pip "
            "install -U gguf), or give the model's Hugging Face folder instead"
        ) from None
    if shape and shape[-1] % block:
        raise _damaged(path, f"{name[:80]} has rows of {shape[-1]} weights, its type blocks of {block}")
    return math.prod(shape) // int(block) * int(size)
