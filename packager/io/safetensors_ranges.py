"""Safetensors files as byte ranges: read a header, find a tensor's bytes, join parts, without loading anything.

The format (https://github.com/huggingface/safetensors#format): eight bytes of header length, a JSON header of
name → {dtype, shape, data_offsets}, then the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import ArtifactError
from packager.io.plain_json import strict_json

_WIDTHS = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
_HEADER_LIMIT = 100 << 20
_CHUNK = 8 << 20
_MOST_SIDES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """`length` bytes at `offset` of a file."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file: `dtype` as the format spells it (F32, U8, …), shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    region: Region


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. ArtifactError when it is damaged or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(_HEADER_LIMIT, size - 8):
                raise ArtifactError(
                    f"{path} is not a whole safetensors file: its header does not fit in its {size} bytes"
                )
            header = strict_json(file.read(length))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file ({str(error)[:200]})") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path}: expected a JSON object as header, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError(f"{path}: __metadata__ is not an object of strings")
    start = 8 + length
    return {name: _entry(path, name, entry, start, size) for name, entry in header.items()}, metadata


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        width = _WIDTHS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise ArtifactError(f"{path}: header entry {ascii(name)[:80]} is malformed ({reason})") from None
    numbers = (begin, end, *shape)
    # Bounded first: a product of many large sides would take for ever.
    if (
        len(shape) > _MOST_SIDES
        or not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
        or begin > end
        or end - begin != math.prod(shape) * width
    ):
        raise ArtifactError(
            f"{path}: tensor {ascii(name)[:80]} of shape {reprlib.repr(shape)} and dtype {dtype} does not match its "
            f"offsets {reprlib.repr([begin, end])}"
        )
    if start + end > size:
        raise ArtifactError(f"{path} is cut short: tensor {name!r} ends at byte {start + end}, the file has {size}")
    return StoredTensor(dtype=dtype, shape=shape, region=Region(path=path, offset=start + begin, length=end - begin))


def sha256_region(region: Region) -> str:
    """Hex SHA-256 of a region's bytes; ArtifactError when the file ends before it."""
    digest = hashlib.sha256()
    for piece in _pieces(region):
        digest.update(piece)
    return digest.hexdigest()


def join(parts: Iterable[tuple[str, StoredTensor]], out: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of the given tensors by copying their bytes, in the order given."""
    entries = list(parts)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in entries:
        if name in header:
            raise ArtifactError(f"{out}: tensor {name!r} given twice")
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.region.length],
        }
        end += tensor.region.length
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for _, tensor in entries:
            for piece in _pieces(tensor.region):
                file.write(piece)


def _pieces(region: Region) -> Iterator[bytes]:
    """A region's bytes in pieces that fit in memory."""
    with region.path.open("rb") as file:
        file.seek(region.offset)
        left = region.length
        while left:
            piece = file.read(min(left, _CHUNK))
            if not piece:
                raise ArtifactError(
                    f"{region.path} is cut short: it ends {left} bytes before byte {region.offset + region.length}"
                )
            yield piece
            left -= len(piece)
