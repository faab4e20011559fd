"""A matrix as the product of a tall and a wide one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from packager.forms.base import Arrays, Floats, TensorSpec
from packager.forms.drawing import Drawing, Value
from packager.forms.factored import FactoredForm
from packager.forms.packing import part, prefixed


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankForm(FactoredForm):
    """W ≈ up · down with up (rows, rank) and down (rank, cols), both stored as `factors`."""

    grammar: ClassVar[str] = "r<n>."
    letter: ClassVar[str] = "r"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """The tensors of both factors, named `down.…` and `up.…`."""
        down = self.factors.tensors(self.rank, cols)
        up = self.factors.tensors(rows, self.rank)
        return {f"down.{name}": spec for name, spec in down.items()} | {f"up.{name}": spec for name, spec in up.items()}

    def pack(self, down: Arrays, up: Arrays) -> dict[str, NDArray[np.generic]]:
        """The stored tensors of two packed factors."""
        return prefixed("down", down) | prefixed("up", up)

    def dequantize(self, tensors: Arrays, rows: int, cols: int) -> Floats:
        """up · down."""
        up = self.factors.dequantize(part(tensors, "up"), rows, self.rank)
        product: Floats = up @ self.factors.dequantize(part(tensors, "down"), self.rank, cols)
        return product

    def draw_product(self, drawing: Drawing[Value], source: Value, rows: int, cols: int) -> Value:
        """Two products, one after the other."""
        few = self.factors.draw_product(drawing.part("down"), source, self.rank, cols)
        return self.factors.draw_product(drawing.part("up"), few, rows, self.rank)

    def heap_bytes(self, rows: int, cols: int, scale_copies: float) -> int:
        """Both factors."""
        down, up = ((self.rank, cols), (rows, self.rank))
        return self.factors.heap_bytes(*down, scale_copies) + self.factors.heap_bytes(*up, scale_copies)

    def mapped_bytes(self, rows: int, cols: int) -> int:
        """Both factors."""
        return self.factors.mapped_bytes(self.rank, cols) + self.factors.mapped_bytes(rows, self.rank)
