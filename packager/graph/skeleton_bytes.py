"""How many bytes of a skeleton come into a bundle's graph beside the weights, read without onnx.

Only the tags and lengths of the protocol buffer are read, and of its tensors the shapes: reading is as fast as it is
for a plan, and needs no library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from packager.errors import ArtifactError
from packager.graph.names import ROTARY_PREFIXES

_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_RAW = 1, 8, 9
_BYTES = 2  # the wire type of whatever has a length before it


def skeleton_bytes(path: Path, context_tokens: int) -> tuple[int, int]:
    """(bytes, tensors) of the skeleton in `path`: of its nodes and constants, with rotary tables cut to the context.

    ArtifactError where the file is no graph.
    """
    content = memoryview(path.read_bytes())
    size, count = len(content), 0
    try:
        for number, graph in _fields(content):
            if number != _MODEL_GRAPH or isinstance(graph, int):
                continue
            for part, tensor in _fields(graph):
                if part == _GRAPH_INITIALIZER and not isinstance(tensor, int):
                    size, count = size - _cut_off(tensor, context_tokens), count + 1
    except (IndexError, ValueError) as error:
        raise ArtifactError(f"{path} is not a graph: it is damaged, score the model again") from error
    return size, count


def _cut_off(tensor: memoryview, context_tokens: int) -> int:
    """Bytes of a constant that a bundle of the context leaves out."""
    dims, name, raw = list[int](), "", 0
    for number, value in _fields(tensor):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _numbers(value)
        elif number == _TENSOR_NAME and not isinstance(value, int):
            name = bytes(value).decode()
        elif number == _TENSOR_RAW and not isinstance(value, int):
            raw = len(value)
    if not name.startswith(ROTARY_PREFIXES) or not dims or dims[0] <= context_tokens:
        return 0
    return raw - raw // dims[0] * context_tokens


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field of a message: whole numbers, or the bytes of what has a length."""
    at = 0
    while at < len(content):
        tag, at = _number(content, at)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            length, at = _number(content, at)
            if at + length > len(content):
                raise ValueError(f"field {number} ends beyond its message")
            yield number, content[at : at + length]
            at += length
        elif wire == 0:
            value, at = _number(content, at)
            yield number, value
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _numbers(content: memoryview) -> list[int]:
    found, at = list[int](), 0
    while at < len(content):
        value, at = _number(content, at)
        found.append(value)
    return found


def _number(content: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value, shift = 0, 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
