"""What every form can do, and what those can do besides that an embedding may have.

Shapes: a matrix W has `rows` = N outputs and `cols` = K inputs, y = W x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from packager.forms.drawing import Drawing, Kernel, Value

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[np.generic]]
"""The tensors of a form by their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One stored tensor: `dtype` as numpy spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        count = 1
        for side in self.shape:
            count *= side
        return count * {"uint8": 1, "float16": 2, "float32": 4, "int32": 4}[self.dtype]


class WeightForm(ABC):
    """A way to store a weight matrix that the runtime's kernels accept."""

    __slots__ = ()

    grammar: ClassVar[str]
    """What its labels look like, for messages."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The form's name, which `parse` reads."""

    @classmethod
    @abstractmethod
    def parse(cls, label: str) -> Self | None:
        """The form that a label names, None where it is one of another class. ArtifactError where its numbers do not
        go together."""

    @abstractmethod
    def tensors(self, rows: int, cols: int) -> dict[str, TensorSpec]:
        """The stored tensors of a (rows, cols) matrix by name, in the order in which they are written."""

    @abstractmethod
    def dequantize(self, tensors: Arrays, rows: int, cols: int) -> Floats:
        """The (rows, cols) float32 matrix that the kernels compute with, in memory of its own."""

    @property
    @abstractmethod
    def kernels(self) -> tuple[Kernel, ...]:
        """The codes that the form's products read, one for each product; none for float."""

    @property
    @abstractmethod
    def price_class(self) -> str:
        """What it has in common with the forms whose prices err alike: one multiplier is measured for all of them."""

    @property
    def activation_block(self) -> int | None:
        """Elements of an input that the form's kernels round to 8 bits together; None where they multiply in float."""
        return self.kernels[0].block if self.kernels else None

    def fills(self, cols: int) -> bool:
        """Whether rows of `cols` elements fill the form's blocks: padding costs bytes and wins nothing."""
        return True

    @abstractmethod
    def draw_product(self, drawing: Drawing[Value], source: Value, rows: int, cols: int) -> Value:
        """Draw `source` (…, cols) · Wᵀ; the (…, rows) product."""

    @abstractmethod
    def heap_bytes(self, rows: int, cols: int, scale_copies: float) -> int:
        """Bytes of the copies that the kernels make of a matrix they multiply by. `scale_copies`: how often they hold
        a scale in them."""

    @abstractmethod
    def mapped_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the file that a matrix which is multiplied keeps resident beside them."""


class TableForm(WeightForm):
    """A form whose rows can be looked up one by one, as those of an embedding are."""

    __slots__ = ()

    @abstractmethod
    def draw_lookup(self, drawing: Drawing[Value], indices: Value, cols: int) -> Value:
        """Draw the lookup of W's rows by `indices`; (…, cols) for each."""
