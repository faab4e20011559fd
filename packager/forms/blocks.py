"""Codes of 2, 4 or 8 bits, as `MatMulNBits` and `GatherBlockQuantized` read them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from packager.forms.base import Arrays, Bytes, Floats, TensorSpec
from packager.forms.codes import BLOCKS, CodesForm
from packager.forms.drawing import Drawing, Kernel, Value
from packager.forms.packing import pack_bits, padded, unpack_bits

BITS = (2, 4, 8)
KERNEL_BLOCKS = {2: (32, 64, 128), 4: BLOCKS, 8: BLOCKS}
"""bits → blocks that ONNX Runtime's CPU has kernels for (`Kernel.fast`)."""
_LANES_2BIT = 4
_LABEL = re.compile(rf"q({'|'.join(map(str, BITS))})g({'|'.join(map(str, BLOCKS))})(z?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockForm(CodesForm):
    """Codes of `bits` bits in blocks of `block` along K, a float32 scale for each block.

    With `zeros` each block also has a zero point of `bits` bits; without, it is 2^(bits-1).
    """

    grammar: ClassVar[str] = "q<bits>g<block>[z]"

    # Without field() the properties of the class above would pass for defaults.
    bits: int = field()
    block: int = field()
    zeros: bool = field()

    @property
    def label(self) -> str:
        """Such as "q4g64", "q2g32z"."""
        return f"q{self.bits}g{self.block}{'z' if self.zeros else ''}"

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """Such as "q4g64", "q2g32z"."""
        match = _LABEL.fullmatch(label)
        return match and cls(bits=int(match[1]), block=int(match[2]), zeros=bool(match[3]))

    @property
    def centre(self) -> int:
        """The kernels' own zero point."""
        return 1 << (self.bits - 1)

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`codes` (rows, blocks, block·bits/8), `scales` (rows, blocks), and `zeros` (rows, ⌈blocks·bits/8⌉)."""
        blocks = self.blocks(cols)
        specs = {
            "codes": TensorSpec(dtype="uint8", shape=(rows, blocks, self.block * self.bits // 8)),
            "scales": TensorSpec(dtype="float32", shape=(rows, blocks)),
        }
        if self.zeros:
            specs["zeros"] = TensorSpec(dtype="uint8", shape=(rows, -(-blocks * self.bits // 8)))
        return specs

    def pack(self, codes: Bytes, scales: Floats, zeros: Bytes | None) -> dict[str, NDArray[np.generic]]:
        """The stored tensors; the padding of the last block holds its zero point."""
        rows, cols = codes.shape
        blocks = self.blocks(cols)
        whole = padded(codes, blocks * self.block, self.centre if zeros is None else zeros[:, -1:])
        packed: dict[str, NDArray[np.generic]] = {
            "codes": pack_bits(whole, self.bits).reshape(rows, blocks, -1),
            "scales": np.ascontiguousarray(scales, dtype=np.float32),
        }
        if zeros is not None:
            packed["zeros"] = pack_bits(zeros, self.bits)
        return packed

    def dequantize(self, tensors: Arrays, rows: int, cols: int) -> Floats:
        """(code - zero point) · scale."""
        blocks = self.blocks(cols)
        packed = np.asarray(tensors["codes"], dtype=np.uint8).reshape(rows, -1)
        codes = unpack_bits(packed, self.bits, blocks * self.block).reshape(rows, blocks, self.block)
        if self.zeros:
            zeros = unpack_bits(np.asarray(tensors["zeros"], dtype=np.uint8), self.bits, blocks).astype(np.float32)
        else:
            zeros = np.full((rows, blocks), self.centre, np.float32)
        scales = np.asarray(tensors["scales"], dtype=np.float32)
        values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None]
        return np.ascontiguousarray(values.reshape(rows, -1)[:, :cols])

    @property
    def kernel(self) -> Kernel:
        """The codes as its one product reads them."""
        return Kernel(bits=self.bits, block=self.block, fast=self.block in KERNEL_BLOCKS[self.bits])

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The one."""
        return (self.kernel,)

    def draw_product(self, drawing: Drawing[Value], source: Value, rows: int, cols: int) -> Value:
        """One product."""
        parts = [drawing.tensor(name) for name in self._inputs]
        return drawing.multiply_blocks("", source, parts, self.kernel, rows, cols)

    def draw_lookup(self, drawing: Drawing[Value], indices: Value, cols: int) -> Value:
        """One lookup, and a cut where blocks pad the rows."""
        parts = [drawing.tensor(name, flat=name == "codes") for name in self._inputs]
        found = drawing.look_up_blocks("", indices, parts, self.kernel)
        return drawing.cut(found, cols) if cols % self.block else found

    @property
    def _inputs(self) -> tuple[str, ...]:
        return ("codes", "scales", "zeros") if self.zeros else ("codes", "scales")

    def heap_bytes(self, rows: int, cols: int, scale_copies: float) -> int:
        """Codes and scales in the kernel's order, and block sums."""
        # The 2-bit kernel takes four blocks at a time: it pads K further than the file does.
        lanes = _LANES_2BIT if self.bits == 2 else 1
        packed = self.tensors(rows, -(-self.blocks(cols) // lanes) * lanes * self.block)
        return packed["codes"].bytes + int(packed["scales"].bytes * scale_copies)

    def mapped_bytes(self, rows: int, cols: int) -> int:
        """The file's scales and zero points."""
        return sum(spec.bytes for name, spec in self.tensors(rows, cols).items() if name != "codes")
