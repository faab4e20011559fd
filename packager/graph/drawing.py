"""A form's drawing as nodes of a graph: the operators of ONNX and of ONNX Runtime that do what the form asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from packager.forms.drawing import Kernel

_DOMAIN = "com.microsoft"

Initializer = Callable[[str, str, bool], ir.Value]
"""(name of the initializer, name of a stored tensor of the unit, whether flat: one row of it for each row of W)."""


def constant(graph: ir.Graph, name: str, content: float | int | list[int]) -> ir.Value:
    """A new initializer of `graph` that lies in the graph itself: a float32 or int64 scalar, or an int64 vector."""
    dtype = ir.DataType.FLOAT if isinstance(content, float) else ir.DataType.INT64
    shape = [len(content)] if isinstance(content, list) else []
    tensor = ir.tensor(content, dtype=dtype, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.register_initializer(value)
    return value


class NodeDrawing:
    """A `Drawing` of one unit: its nodes are named `base`/…, its initializers `prefix`.….

    `nodes` grows in the order in which they compute; it belongs to no graph yet. Initializers do at once.
    """

    def __init__(
        self,
        graph: ir.Graph,
        nodes: list[ir.Node],
        initializer: Initializer,
        *,
        base: str,
        prefix: str,
        accuracy_level: int,
        part: str = "",
    ) -> None:
        self._graph = graph
        self._nodes = nodes
        self._initializer = initializer
        self._base = base
        self._prefix = prefix
        self._accuracy_level = accuracy_level
        self._part = part

    def tensor(self, name: str, *, flat: bool = False) -> ir.Value:
        """An initializer over the tensor's bytes."""
        return self._initializer(f"{self._prefix}.{self._part}{name}", f"{self._part}{name}", flat)

    def part(self, name: str) -> NodeDrawing:
        """Nodes `base`/`name`, tensors `name`.…, in the same list."""
        return NodeDrawing(
            self._graph,
            self._nodes,
            self._initializer,
            base=f"{self._base}/{name}",
            prefix=self._prefix,
            accuracy_level=self._accuracy_level,
            part=f"{self._part}{name}.",
        )

    def constant(self, name: str, number: float) -> ir.Value:
        """A float32 scalar in the graph itself."""
        return constant(self._graph, f"{self._base}/{name}", float(number))

    def multiply_float(self, name: str, source: ir.Value, weight: ir.Value) -> ir.Value:
        """FusedMatMul, which reads the matrix as it is stored."""
        return self._kernel("FusedMatMul", name, [source, weight], transB=1)

    def multiply_blocks(
        self, name: str, source: ir.Value, tensors: Sequence[ir.Value], kernel: Kernel, rows: int, cols: int
    ) -> ir.Value:
        """MatMulNBits."""
        return self._kernel(
            "MatMulNBits",
            name,
            [source, *tensors],
            K=cols,
            N=rows,
            bits=kernel.bits,
            block_size=kernel.block,
            accuracy_level=self._accuracy_level,
        )

    def look_up_float(self, name: str, indices: ir.Value, weight: ir.Value) -> ir.Value:
        """Gather."""
        return self._append(ir.Node("", "Gather", [weight, indices], name=self._title(name)))

    def look_up_blocks(self, name: str, indices: ir.Value, tensors: Sequence[ir.Value], kernel: Kernel) -> ir.Value:
        """GatherBlockQuantized."""
        codes, *grid = tensors
        return self._kernel(
            "GatherBlockQuantized",
            name,
            [codes, indices, *grid],
            bits=kernel.bits,
            block_size=kernel.block,
            gather_axis=0,
            quantize_axis=1,
        )

    def concat(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Concat."""
        return self._operator("Concat", parts, [ir.AttrInt64("axis", -1)])

    def pick(self, source: ir.Value, order: ir.Value) -> ir.Value:
        """Gather along the last axis."""
        return self._operator("Gather", [source, order], [ir.AttrInt64("axis", -1)])

    def cut(self, source: ir.Value, count: int) -> ir.Value:
        """Slice."""
        bounds = [
            constant(self._graph, f"{self._base}/{role}", [number])
            for role, number in (("start", 0), ("stop", count), ("axis", -1))
        ]
        return self._operator("Slice", [source, *bounds])

    def scale(self, source: ir.Value, factor: ir.Value) -> ir.Value:
        """Mul."""
        return self._operator("Mul", [source, factor])

    def add(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """Add."""
        return self._operator("Add", [first, second])

    def _title(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def _kernel(self, kind: str, name: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        numbers = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        return self._append(ir.Node(_DOMAIN, kind, inputs, numbers, name=self._title(name)))

    def _operator(self, kind: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        return self._append(ir.Node("", kind, inputs, attributes, name=f"{self._base}/{kind}"))

    def _append(self, node: ir.Node) -> ir.Value:
        self._nodes.append(node)
        return node.outputs[0]
