"""A matrix as some of its rows, and the others made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from packager.errors import ArtifactError
from packager.forms.base import Arrays, Floats, TensorSpec
from packager.forms.drawing import Drawing, Value
from packager.forms.factored import FactoredForm
from packager.forms.packing import part, prefixed


@dataclass(frozen=True, kw_only=True, slots=True)
class PivotForm(FactoredForm):
    """W ≈ P [I; rest] base: `base` (rank, cols) stands for as many of W's own rows, `rest` (rows - rank, rank) makes
    the others of them, `order` says which: row i of W is row order[i] of [I; rest] base.

    It has rank · (rows + cols - rank) elements: unlike two factors, fewer than W at every rank.
    """

    grammar: ClassVar[str] = "p<n>."
    letter: ClassVar[str] = "p"

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """The tensors of both factors, named `base.…` and `rest.…`, and `order` (rows,). ArtifactError where the rank
        is not below the rows."""
        if self.rank >= rows:
            raise ArtifactError(f"form {self.label!r}: its rank is not below the {rows} rows of the matrix")
        base = self.factors.tensors(self.rank, cols)
        rest = self.factors.tensors(rows - self.rank, self.rank)
        return (
            {f"base.{name}": spec for name, spec in base.items()}
            | {f"rest.{name}": spec for name, spec in rest.items()}
            | {"order": TensorSpec(dtype="int32", shape=(rows,))}
        )

    def pack(self, base: Arrays, rest: Arrays, order: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
        """The stored tensors of two packed factors and the order (rows,)."""
        return prefixed("base", base) | prefixed("rest", rest) | {"order": order}

    def dequantize(self, tensors: Arrays, rows: int, cols: int) -> Floats:
        """[I; rest] base, its rows in order."""
        base = self.factors.dequantize(part(tensors, "base"), self.rank, cols)
        rest = self.factors.dequantize(part(tensors, "rest"), rows - self.rank, self.rank)
        stacked: Floats = np.concatenate([base, rest @ base])[np.asarray(tensors["order"])]
        return stacked

    def draw_product(self, drawing: Drawing[Value], source: Value, rows: int, cols: int) -> Value:
        """Two products, the second over the first, both side by side and put in order."""
        few = self.factors.draw_product(drawing.part("base"), source, self.rank, cols)
        rest = self.factors.draw_product(drawing.part("rest"), few, rows - self.rank, self.rank)
        return drawing.pick(drawing.concat([few, rest]), drawing.tensor("order"))

    def heap_bytes(self, rows: int, cols: int, scale_copies: float) -> int:
        """Both factors."""
        base, rest = ((self.rank, cols), (rows - self.rank, self.rank))
        return self.factors.heap_bytes(*base, scale_copies) + self.factors.heap_bytes(*rest, scale_copies)

    def mapped_bytes(self, rows: int, cols: int) -> int:
        """Both factors, and the order."""
        factors = self.factors.mapped_bytes(self.rank, cols) + self.factors.mapped_bytes(rows - self.rank, self.rank)
        return factors + self.tensors(rows, cols)["order"].bytes
