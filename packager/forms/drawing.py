"""What a form asks of the graph that computes with it: the operators, by what they do.

A form draws its product and its lookup on a `Drawing`; graph.surgery makes nodes of it, `NodeCount` counts them. So
forms need no graph library, and the number of nodes follows from the same lines that make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

Value = TypeVar("Value")
"""What flows between operators: a graph's value, or nothing where nodes are only counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """Codes as one product reads them: of `bits` bits, in blocks of `block` along a row. `fast` says whether ONNX
    Runtime's CPU multiplies by them as they are. It multiplies by others too, but turns them into floats at every run:
    one row of activations then takes a hundred times as long (benchmarks/kernels.py)."""

    bits: int
    block: int
    fast: bool


class Drawing(Protocol[Value]):
    """One stored matrix W (rows, cols) on its way into a graph.

    `name` tells apart the kernels of one matrix, "" where there is one. Other operators are named after what they do: a
    form has one of each.
    """

    def tensor(self, name: str, *, flat: bool = False) -> Value:
        """A tensor of the form by its name; with `flat` one row of it for each row of W."""

    def part(self, name: str) -> Self:
        """The drawing of a matrix that W is made of, whose tensors are named `name`.…"""

    def constant(self, name: str, number: float) -> Value:
        """A float32 scalar."""

    def multiply_float(self, name: str, source: Value, weight: Value) -> Value:
        """`source` (…, cols) · Wᵀ by the matrix itself."""

    def multiply_blocks(
        self, name: str, source: Value, tensors: Sequence[Value], kernel: Kernel, rows: int, cols: int
    ) -> Value:
        """`source` (…, cols) · Wᵀ by codes, scales and, where there are any, zero points."""

    def look_up_float(self, name: str, indices: Value, weight: Value) -> Value:
        """Rows of the matrix itself, by `indices`."""

    def look_up_blocks(self, name: str, indices: Value, tensors: Sequence[Value], kernel: Kernel) -> Value:
        """Rows of codes, scales and, where there are any, zero points, by `indices`."""

    def concat(self, parts: Sequence[Value]) -> Value:
        """`parts` side by side along the last axis."""

    def pick(self, source: Value, order: Value) -> Value:
        """The elements of the last axis in `order`."""

    def cut(self, source: Value, count: int) -> Value:
        """The first `count` elements of the last axis."""

    def scale(self, source: Value, factor: Value) -> Value:
        """`source` times a constant."""

    def add(self, first: Value, second: Value) -> Value:
        """The sum of two."""


class NodeCount:
    """A drawing that only counts its nodes."""

    def __init__(self) -> None:
        self.nodes = 0

    def _node(self) -> None:
        self.nodes += 1

    def tensor(self, name: str, *, flat: bool = False) -> None:
        """No node."""

    def part(self, name: str) -> Self:
        """Counted together with the rest."""
        return self

    def constant(self, name: str, number: float) -> None:
        """No node."""

    def multiply_float(self, name: str, source: None, weight: None) -> None:
        """One node, as each of those below."""
        self._node()

    def multiply_blocks(
        self, name: str, source: None, tensors: Sequence[None], kernel: Kernel, rows: int, cols: int
    ) -> None:
        """One node."""
        self._node()

    def look_up_float(self, name: str, indices: None, weight: None) -> None:
        """One node."""
        self._node()

    def look_up_blocks(self, name: str, indices: None, tensors: Sequence[None], kernel: Kernel) -> None:
        """One node."""
        self._node()

    def concat(self, parts: Sequence[None]) -> None:
        """One node."""
        self._node()

    def pick(self, source: None, order: None) -> None:
        """One node."""
        self._node()

    def cut(self, source: None, count: int) -> None:
        """One node."""
        self._node()

    def scale(self, source: None, factor: None) -> None:
        """One node."""
        self._node()

    def add(self, first: None, second: None) -> None:
        """One node."""
        self._node()
