"""Prefill over a cache of 8-bit codes, at a float cache's speed.

The kernel's products with codes are made for one row: a chunk of 128 tokens over 3,900 cached ones takes one layer
three times as long as over floats. So a layer's attention becomes an `If`. One row, a decoded token, goes to the kernel
that reads codes. More rows go over a copy of the past in floats, which one layer at a time holds:

    past codes → cut to the tokens there are → float · scale ┐
    query, key, value ───────────────────── float attention ─┴→ output
    present, in floats → cut to the new rows → / scale, rounded, saturated → ScatterND into the past codes

ScatterND writes the new rows into the buffer itself where past and present are one, as the runtime has them, and the
codes are bit for bit those that the kernel writes. Where past and present are two buffers the past has no room for new
rows, and the kernel serves any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from packager.graph.names import PAST_KEY, QUERY, TOTAL

KvScales = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(key, value): the scale of each channel's codes, (kv_heads, head_dim)."""

_KERNEL, _FLOATS, _BRANCH = "kernel", "floats", "by_rows"
_ROLES = ("key", "value")
_STRIDE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillInputs:
    """What the layers ask of one pass over new rows, worked out once: whether `floats` serve it, (1,); its tokens
    `past` and `total`, (1,); how much of a buffer to `cut`, (1,), which is the total in whole strides: pieces of memory
    that grew with every chunk would leave holes between them; the `places` of its rows in a key/value cache, (1,
    kv_heads, rows, 3). Beside them constants that every layer needs.
    """

    floats: ir.Value
    past: ir.Value
    total: ir.Value
    cut: ir.Value
    places: ir.Value
    first: ir.Value
    axis: ir.Value
    unit: ir.Value
    code: ir.Value


class _Scope:
    """New nodes and constants, all named under one prefix: a subgraph may not use a name of the graph around it."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self._prefix = graph, prefix

    def node(self, kind: str, *inputs: ir.Value | None, name: str = "", **attributes: Any) -> ir.Value:
        """The output of a new node."""
        title = f"{self._prefix}/{name or kind}"
        self.nodes.append(ir.node(kind, inputs, attributes, outputs=[ir.Value(name=f"{title}/output_0")], name=title))
        return self.nodes[-1].outputs[0]

    def attention(self, like: ir.Node, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        """The outputs of a node that is as `like` but for its inputs and names."""
        outputs = [ir.Value(name=f"{self._prefix}/output_{at}") for at in range(len(like.outputs))]
        self.nodes.append(
            ir.Node(
                like.domain,
                like.op_type,
                inputs,
                like.attributes.values(),
                outputs=outputs,
                name=f"{self._prefix}/{like.op_type}",
            )
        )
        return outputs

    def constant(self, name: str, content: NDArray[Any]) -> ir.Value:
        """An initializer of the outer graph, which every subgraph sees."""
        tensor = ir.Tensor(content, name=f"{self._prefix}/{name}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def branch(self, outputs: Sequence[ir.Value]) -> ir.Graph:
        """The nodes as one side of an `If`."""
        return ir.Graph(inputs=[], outputs=outputs, nodes=self.nodes, name=self._prefix)


def count_rows(graph: ir.Graph, attention: ir.Node, kv_heads: int) -> PrefillInputs:
    """Nodes in `graph` that say what a pass is, for the layers with `kv_heads`, of which `attention` is one.

    One sequence at a time: of several, each may have a past of its own.
    """
    scope = _Scope(graph, f"/model/prefill.{kv_heads}")
    query, past_key, tokens = (attention.inputs[at] for at in (QUERY, PAST_KEY, TOTAL))
    one, flat, axis = (
        scope.constant(name, np.array([number])) for name, number in (("one", 1), ("flat", -1), ("axis", 2))
    )
    rows = scope.node("Shape", query, name="rows", start=1, end=2)
    total = scope.node("Reshape", scope.node("Cast", tokens, to=ir.DataType.INT64), flat, name="total")
    past = scope.node("Sub", total, rows, name="past")
    stride = scope.constant("stride", np.array([_STRIDE]))
    before = scope.node("Div", scope.node("Sub", total, one, name="last"), stride, name="whole")
    cut = scope.node("Mul", scope.node("Add", before, one, name="strides"), stride, name="cut")
    several = scope.node("Greater", rows, one, name="several")
    room = scope.node(
        "GreaterOrEqual", scope.node("Shape", past_key, name="buffer", start=2, end=3), total, name="room"
    )
    alone = scope.node("Equal", scope.node("Shape", query, name="sequences", start=0, end=1), one, name="alone")
    floats = scope.node("And", scope.node("And", several, room, name="several_and_room"), alone, name="floats")
    begin, end = (scope.node("Squeeze", value, name=name) for value, name in ((past, "begin"), (total, "end")))
    row = scope.node("Range", begin, end, scope.constant("step", np.array(1)))
    # (rows, 1) · (0, 0, 1) + (1, kv_heads, 1, 3) of (0, head, 0): which sequence, which head, which row.
    heads = np.zeros((1, kv_heads, 1, 3), np.int64)
    heads[0, :, 0, 1] = np.arange(kv_heads)
    along = scope.node("Mul", scope.node("Unsqueeze", row, flat), scope.constant("along", np.array([0, 0, 1])))
    places = scope.node("Add", along, scope.constant("heads", heads), name="places")
    graph.extend(scope.nodes)
    first, unit = scope.constant("first", np.array([0])), scope.constant("unit", np.array(1, np.float32))
    code = scope.constant("code", np.array(0, np.int8))
    return PrefillInputs(
        floats=floats, past=past, total=total, cut=cut, places=places, first=first, axis=axis, unit=unit, code=code
    )


def over_floats(graph: ir.Graph, attention: ir.Node, scales: KvScales, prefill: PrefillInputs) -> ir.Graph:
    """The branch for several rows: `attention`, still one over floats, on the past in `scales`, its present back in
    codes."""
    scope = _Scope(graph, f"{attention.name}/{_FLOATS}")
    past = attention.inputs[PAST_KEY : PAST_KEY + 2]
    wide = []
    for role, codes, scale in zip(_ROLES, past, scales, strict=True):
        cut = scope.node("Slice", codes, prefill.first, prefill.cut, prefill.axis, name=f"{role}/past")
        number = scope.node("Cast", cut, name=f"{role}/number", to=ir.DataType.FLOAT)
        wide.append(
            scope.node("Mul", number, scope.constant(f"{role}/step", scale[None, :, None]), name=f"{role}/wide")
        )
    inputs = [*attention.inputs[:PAST_KEY], *wide, *attention.inputs[PAST_KEY + 2 :]]
    output, *present = scope.attention(attention, inputs)
    outputs = [output]
    for role, codes, scale, whole in zip(_ROLES, past, scales, present, strict=True):
        new = scope.node("Slice", whole, prefill.past, prefill.total, prefill.axis, name=f"{role}/new")
        # As the kernel does it: times 1 / scale. A division now and then rounds to the code beside.
        scaled = scope.node(
            "Mul", new, scope.constant(f"{role}/inverse", 1 / scale[None, :, None]), name=f"{role}/scaled"
        )
        rounded = scope.node("QuantizeLinear", scaled, prefill.unit, prefill.code, name=f"{role}/codes")
        outputs.append(scope.node("ScatterND", codes, prefill.places, rounded, name=f"{role}/present"))
    return scope.branch(outputs)


def branch_on_rows(graph: ir.Graph, attention: ir.Node, floats: ir.Graph, prefill: PrefillInputs) -> None:
    """Put an `If` in the place of `attention`, by now one over codes: `floats` of `over_floats` where `prefill` says
    so, else itself."""
    scope = _Scope(graph, f"{attention.name}/{_KERNEL}")
    kernel = scope.branch(scope.attention(attention, attention.inputs))
    _replace(
        graph,
        attention,
        ir.node(
            "If",
            [prefill.floats],
            {"then_branch": floats, "else_branch": kernel},
            num_outputs=3,
            name=f"{attention.name}/{_BRANCH}",
        ),
    )


def unbranch(graph: ir.Graph) -> None:
    """Undo `branch_on_rows`: every attention is its kernel over codes. What counted rows is left without use."""
    for node in list(graph):
        name, _, kind = (node.name or "").rpartition("/")
        if kind == _BRANCH:
            (attention,) = node.attributes["else_branch"].as_graph()
            _replace(
                graph,
                node,
                ir.Node(
                    attention.domain,
                    attention.op_type,
                    attention.inputs,
                    attention.attributes.values(),
                    num_outputs=3,
                    name=name,
                ),
            )


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)
