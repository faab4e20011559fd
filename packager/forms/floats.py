"""The matrix itself, in floats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from packager.forms.base import Arrays, Floats, TableForm, TensorSpec
from packager.forms.drawing import Drawing, Kernel, Value

_DTYPES = {"f32": "float32", "f16": "float16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatForm(TableForm):
    """The matrix itself. `label` is "f32" or "f16"."""

    grammar: ClassVar[str] = ", ".join(_DTYPES)

    label: str = field()  # without field() the property of the class above would pass for its default

    @classmethod
    def parse(cls, label: str) -> Self | None:
        """ "f32", "f16"."""
        return cls(label=label) if label in _DTYPES else None

    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """`weight` of shape (rows, cols)."""
        return {"weight": TensorSpec(dtype=_DTYPES[self.label], shape=(rows, cols))}

    def pack(self, weights: Floats) -> dict[str, NDArray[np.generic]]:
        """The stored tensor of (rows, cols) `weights`."""
        return {"weight": weights.astype(_DTYPES[self.label])}

    def dequantize(self, tensors: Arrays, rows: int, cols: int) -> Floats:
        """A copy as float32."""
        return np.array(tensors["weight"], dtype=np.float32)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """None: float runs everywhere."""
        return ()

    @property
    def price_class(self) -> str:
        """A class of its own, which costs nothing."""
        return "float"

    def draw_product(self, drawing: Drawing[Value], source: Value, rows: int, cols: int) -> Value:
        """One product."""
        return drawing.multiply_float("", source, drawing.tensor("weight"))

    def draw_lookup(self, drawing: Drawing[Value], indices: Value, cols: int) -> Value:
        """One lookup."""
        return drawing.look_up_float("", indices, drawing.tensor("weight"))

    def heap_bytes(self, rows: int, cols: int, scale_copies: float) -> int:
        """The whole matrix: it is packed in the product's order."""
        return self.tensors(rows, cols)["weight"].bytes

    def mapped_bytes(self, rows: int, cols: int) -> int:
        """Nothing of it stays mapped."""
        return 0
