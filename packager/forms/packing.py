"""Codes to the bytes that `MatMulNBits` and `GatherBlockQuantized` read, and back.

Layout (ONNX Runtime's contrib operators): within a byte the first code lies in the lowest bits; a row's
blocks follow each other; K is padded to whole blocks; zero points are packed along a row's blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from packager.forms.base import Arrays, Bytes


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """(…, n) codes below 2^bits → (…, ⌈n·bits/8⌉) bytes, lowest bits first, padded with zeros."""
    per_byte = 8 // bits
    if per_byte == 1:
        return np.ascontiguousarray(codes, dtype=np.uint8)
    short = -codes.shape[-1] % per_byte
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), np.uint8)], axis=-1)
    lanes = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = np.zeros(lanes.shape[:-1], np.uint8)
    for lane in range(per_byte):
        packed |= lanes[..., lane] << np.uint8(lane * bits)
    return packed


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    """(…, b) bytes → (…, count) codes; the inverse of pack_bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed[..., :count]
    mask = np.uint8(2**bits - 1)
    lanes = np.stack([(packed >> np.uint8(lane * bits)) & mask for lane in range(per_byte)], axis=-1)
    codes: Bytes = lanes.reshape(*packed.shape[:-1], -1)[..., :count]
    return codes


def padded(codes: Bytes, cols: int, fill: Bytes | int) -> Bytes:
    """(rows, K) codes with rows of `cols`: what is added holds the zero point `fill`, one for all rows or (rows, 1), so
    that it dequantises to zero."""
    rows, short = codes.shape[0], cols - codes.shape[1]
    if not short:
        return codes
    return np.concatenate([codes, np.broadcast_to(np.asarray(fill, np.uint8), (rows, short))], axis=1)


def prefixed(prefix: str, tensors: Arrays) -> dict[str, NDArray[np.generic]]:
    """The tensors of one part of a form of several, under that part's names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(tensors: Arrays, prefix: str) -> dict[str, NDArray[np.generic]]:
    """The tensors of one part under their own names; the inverse of `prefixed`."""
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }
