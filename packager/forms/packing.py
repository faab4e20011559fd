"""Codes to the packed bytes that `MatMulNBits` and `GatherBlockQuantized` read, and back.

Layout (ONNX Runtime's contrib operators): within a byte the first code lies in the lowest bits; a row's
blocks follow each other; K is padded to whole blocks; zero points are packed along a row's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from packager.forms.registry import BlockForm, FloatForm, Form, LowRankForm, PivotForm, SplitForm

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


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


def pack_blocks(form: BlockForm, codes: Bytes, scales: Floats, zeros: Bytes | None) -> dict[str, NDArray[np.generic]]:
    """The stored tensors of a matrix: codes (N, K), scales (N, blocks), zero points (N, blocks) or None.

    The padding of the last block holds the zero point, so it dequantises to zero.
    """
    rows, cols = codes.shape
    blocks = form.blocks(cols)
    short = blocks * form.block - cols
    if short:
        fill = zeros[:, -1:] if zeros is not None else np.full((rows, 1), 2 ** (form.bits - 1), np.uint8)
        codes = np.concatenate([codes, np.repeat(fill, short, axis=1)], axis=1)
    packed: dict[str, NDArray[np.generic]] = {
        "codes": pack_bits(codes, form.bits).reshape(rows, blocks, -1),
        "scales": np.ascontiguousarray(scales, dtype=np.float32),
    }
    if zeros is not None:
        packed["zeros"] = pack_bits(zeros, form.bits)
    return packed


def prefixed(prefix: str, tensors: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """The tensors of one part of a form of several, under that part's names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(tensors: Mapping[str, NDArray[np.generic]], prefix: str) -> dict[str, NDArray[np.generic]]:
    """The tensors of one part under their own names; the inverse of `prefixed`."""
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }


def dequantize(form: Form, tensors: Mapping[str, NDArray[np.generic]], rows: int, cols: int) -> Floats:
    """The (rows, cols) float32 matrix that the kernels compute with, in memory of its own."""
    match form:
        case FloatForm():
            return np.array(tensors["weight"], dtype=np.float32)
        case SplitForm(high=high, low=low):
            scales = tensors["scales"]
            upper = _dequantize_blocks(high, {"codes": tensors["high"], "scales": scales}, rows, cols)
            whole: Floats = 4 * upper + _dequantize_blocks(low, {"codes": tensors["low"], "scales": scales}, rows, cols)
            return whole
        case LowRankForm(rank=rank, factors=factors):
            product: Floats = dequantize(factors, part(tensors, "up"), rows, rank) @ dequantize(
                factors, part(tensors, "down"), rank, cols
            )
            return product
        case PivotForm(rank=rank, factors=factors):
            base = dequantize(factors, part(tensors, "base"), rank, cols)
            rest = dequantize(factors, part(tensors, "rest"), rows - rank, rank)
            stacked: Floats = np.concatenate([base, rest @ base])[np.asarray(tensors["order"])]
            return stacked
        case BlockForm():
            return _dequantize_blocks(form, tensors, rows, cols)


def _dequantize_blocks(form: BlockForm, tensors: Mapping[str, NDArray[np.generic]], rows: int, cols: int) -> Floats:
    blocks = form.blocks(cols)
    packed = np.asarray(tensors["codes"], dtype=np.uint8).reshape(rows, -1)
    codes = unpack_bits(packed, form.bits, blocks * form.block).reshape(rows, blocks, form.block)
    if form.zeros:
        zeros = unpack_bits(np.asarray(tensors["zeros"], dtype=np.uint8), form.bits, blocks).astype(np.float32)
    else:
        zeros = np.full((rows, blocks), 2 ** (form.bits - 1), np.float32)
    scales = np.asarray(tensors["scales"], dtype=np.float32)
    values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :cols])
