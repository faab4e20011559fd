"""Codes of 6 bits, which no kernel has, in the two parts that kernels read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from packager.forms.base import Arrays, Bytes, Floats, TensorSpec
from packager.forms.blocks import BlockForm
from packager.forms.codes import BLOCKS, CodesForm
from packager.forms.drawing import Drawing, Kernel, Value

_LABEL = re.compile(rf"q6g({'|'.join(map(str, BLOCKS))})")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitForm(CodesForm):
    """Codes of 6 bits cut into their upper 4 and lower 2 bits: a kernel reads each, and four times the one product plus
    the other is that of the whole. The two share one float32 scale for each block, so the whole costs what 6-bit codes
    would cost. The zero point is 34, the kernels' own 8 and 2 put together.
    """

    grammar: ClassVar[str] = "q6g<block>"

    block: int = field()  # without field() the property of the class above would pass for its default

    @property
    def label(self) -> str:
        """Such as "q6g64"."""
        return f"q6g{self.block}"

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """Such as "q6g64"."""
        match = _LABEL.fullmatch(label)
        return match and cls(block=int(match[1]))

    @property
    def high(self) -> BlockForm:
        """How the upper bits are read."""
        return BlockForm(bits=4, block=self.block, zeros=False)

    @property
    def low(self) -> BlockForm:
        """How the lower bits are read."""
        return BlockForm(bits=2, block=self.block, zeros=False)

    @property
    def bits(self) -> int:
        """Of the codes before they are cut."""
        return self.high.bits + self.low.bits

    @property
    def zeros(self) -> bool:
        """No block has a zero point of its own."""
        return False

    @property
    def centre(self) -> int:
        """What the kernels' zero points of both parts stand for together."""
        return (self.high.centre << self.low.bits) + self.low.centre

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`high` and `low`, the codes of each, and the `scales` of both."""
        high, low = self.high.tensors(rows, cols), self.low.tensors(rows, cols)
        return {"high": high["codes"], "low": low["codes"], "scales": low["scales"]}

    def pack(self, codes: Bytes, scales: Floats, zeros: Bytes | None) -> dict[str, NDArray[np.generic]]:
        """The stored tensors; `zeros` is None."""
        upper, lower = np.divmod(codes, np.uint8(2**self.low.bits))
        high, low = self.high.pack(upper, scales, None), self.low.pack(lower, scales, None)
        return {"high": high["codes"], "low": low["codes"], "scales": low["scales"]}

    def dequantize(self, tensors: Arrays, rows: int, cols: int) -> Floats:
        """Four times the upper bits and the lower ones."""
        upper, lower = (
            form.dequantize({"codes": tensors[name], "scales": tensors["scales"]}, rows, cols)
            for name, form in (("high", self.high), ("low", self.low))
        )
        whole: Floats = 4 * upper + lower
        return whole

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """That of the upper bits and that of the lower ones."""
        return (self.high.kernel, self.low.kernel)

    def draw_product(self, drawing: Drawing[Value], source: Value, rows: int, cols: int) -> Value:
        """Two products, joined."""
        high, low, scales = (drawing.tensor(name) for name in ("high", "low", "scales"))
        upper = drawing.multiply_blocks("high", source, [high, scales], self.high.kernel, rows, cols)
        lower = drawing.multiply_blocks("low", source, [low, scales], self.low.kernel, rows, cols)
        return _joined(drawing, upper, lower)

    def draw_lookup(self, drawing: Drawing[Value], indices: Value, cols: int) -> Value:
        """Two lookups, joined, and a cut where blocks pad the rows."""
        high, low = (drawing.tensor(name, flat=True) for name in ("high", "low"))
        scales = drawing.tensor("scales")
        upper = drawing.look_up_blocks("high", indices, [high, scales], self.high.kernel)
        lower = drawing.look_up_blocks("low", indices, [low, scales], self.low.kernel)
        found = _joined(drawing, upper, lower)
        return drawing.cut(found, cols) if cols % self.block else found

    def heap_bytes(self, rows: int, cols: int, scale_copies: float) -> int:
        """What both kernels take."""
        return self.high.heap_bytes(rows, cols, scale_copies) + self.low.heap_bytes(rows, cols, scale_copies)

    def mapped_bytes(self, rows: int, cols: int) -> int:
        """The scales, once."""
        return self.tensors(rows, cols)["scales"].bytes


def _joined(drawing: Drawing[Value], upper: Value, lower: Value) -> Value:
    """Four times what the upper bits make, plus what the lower bits make."""
    return drawing.add(drawing.scale(upper, drawing.constant("four", 4.0)), lower)
