"""Weights into the skeleton: every matrix node is replaced by the nodes that the chosen form draws.

The bytes of a tensor are not interpreted here: they are copied from where they lie into one external data file, so
building a size costs what copying it costs. A unit that meets no node, or a node that meets no unit, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from packager.errors import ExportError
from packager.forms.base import TableForm, TensorSpec
from packager.forms.registry import Form
from packager.graph.drawing import NodeDrawing, constant
from packager.graph.kv_cache_codes import LayerScales, quantise_caches
from packager.graph.names import EMBEDDING, ROTARY_PREFIXES
from packager.io.files import copy_range
from packager.io.safetensors_ranges import Region

_DTYPES = {
    "uint8": ir.DataType.UINT8,
    "float16": ir.DataType.FLOAT16,
    "float32": ir.DataType.FLOAT,
    "int32": ir.DataType.INT32,
}
_ALIGNMENT = 64
_INLINE_LIMIT = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One unit in its chosen form, and where each of its tensors lies.

    The unit is `rows` rows, from row `start`, of the graph's weight `matrix`.
    """

    name: str
    matrix: str
    start: int
    tied: bool
    rows: int
    cols: int
    form: Form
    regions: Mapping[str, Region]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphOptions:
    """What the graph is bounded to: `context_tokens` positions, kernels at `accuracy_level` (4: 8-bit activations).

    With `cache_scales` the key/value cache holds 8-bit codes, without it floats.
    """

    context_tokens: int
    accuracy_level: int
    cache_scales: LayerScales | None = None


def write_model(skeleton: Path, placements: Iterable[Placement], options: GraphOptions, out: Path) -> dict[str, int]:
    """Write `out` and its external data `<out>_data` from a skeleton graph and placed units.

    Returns the bytes written for each unit. Raises ExportError when units and nodes do not match one to one.
    """
    model = ir.load(skeleton)
    _bound_rotary_tables(model.graph, options.context_tokens)
    if options.cache_scales is not None:
        quantise_caches(model.graph, options.cache_scales)
    sizes: dict[str, int] = {}
    data_path = out.with_name(out.name + "_data")
    with data_path.open("wb") as data:
        surgeon = _Surgeon(model.graph, data, data_path.name, options)
        for placement in placements:
            sizes[placement.name] = surgeon.place(placement)
        surgeon.finish()
        surgeon.externalise_rest()
    model.graph.sort()
    model.producer_name = "edge-packager"
    ir.save(model, out)
    return sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """A placed unit, and where in the data file each of its tensors lies."""

    placement: Placement
    tensors: dict[str, tuple[int, TensorSpec]]


class _Surgeon:
    """One pass over one graph: holds the data file's end and the weights still waiting for their unit."""

    def __init__(self, graph: ir.Graph, data: BinaryIO, location: str, options: GraphOptions) -> None:
        self._graph = graph
        self._data = data
        self._location = location
        self._options = options
        names = {value.name: value for value in graph.inputs if value.name and value.name.endswith(".weight")}
        self._waiting: dict[str, ir.Value] = names
        self._segments: dict[str, list[_Segment]] = {}

    def place(self, placement: Placement) -> int:
        """Copy the unit's bytes; `finish` rewires its nodes. Returns the bytes written."""
        written, tensors = 0, {}
        specs = placement.form.tensors(placement.rows, placement.cols)
        if set(specs) != set(placement.regions):
            raise ExportError(
                f"{placement.name}: form {placement.form.label} needs tensors {sorted(specs)}, the store has "
                f"{sorted(placement.regions)}"
            )
        for name, spec in specs.items():
            region = placement.regions[name]
            if region.length != spec.bytes:
                raise ExportError(
                    f"{placement.name}.{name}: expected {spec.bytes} bytes for {spec.shape}, the store has "
                    f"{region.length}"
                )
            tensors[name] = (self._copy(region), spec)
            written += spec.bytes
        self._segments.setdefault(placement.matrix, []).append(_Segment(placement=placement, tensors=tensors))
        return written

    def finish(self) -> None:
        """Rewire every weight to its units' kernels; weights and units must meet one to one."""
        for matrix, segments in self._segments.items():
            segments.sort(key=lambda segment: segment.placement.start)
            tied = segments[0].placement.tied
            if matrix == EMBEDDING or tied:
                self._rewire(f"{EMBEDDING}.weight", segments, self._gather)
            if matrix != EMBEDDING:
                self._rewire(f"{matrix}.MatMul.weight", segments, self._multiply)
        if self._waiting:
            raise ExportError(f"graph weights without a unit in the map: {sorted(self._waiting)}")

    def externalise_rest(self) -> None:
        """Move what is left of large constants (rotary tables) into the data file; small ones stay inline."""
        for name, value in list(self._graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < _INLINE_LIMIT:
                continue
            offset = self._align()
            content = tensor.tobytes()
            self._data.write(content)
            value.const_value = self._external(name, tensor.dtype, tuple(tensor.shape.numpy()), offset, len(content))

    def _align(self) -> int:
        end = self._data.tell()
        self._data.write(b"\0" * (-end % _ALIGNMENT))
        return self._data.tell()

    def _copy(self, region: Region) -> int:
        """Append the region to the data file, in the kernel where it can; returns where it starts."""
        start = self._align()
        with region.path.open("rb") as source:
            if copy_range(source, region.offset, region.length, self._data) < region.length:
                raise ExportError(
                    f"{region.path} ends before byte {region.offset + region.length}: it is cut short, score the "
                    "model again"
                )
        return start

    def _external(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, length: int
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(self._location, offset, length, dtype, shape=ir.Shape(shape), name=name)

    def _initializer(self, name: str, offset: int, spec: TensorSpec, shape: tuple[int, ...]) -> ir.Value:
        """An initializer over bytes already in the file. Two may share the same bytes under two shapes."""
        dtype = _DTYPES[spec.dtype]
        tensor = self._external(name, dtype, shape, offset, spec.bytes)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _rewire(
        self, weight: str, segments: Sequence[_Segment], make: Callable[[ir.Node, Sequence[_Segment]], list[ir.Node]]
    ) -> None:
        """Put the nodes that `make` returns in the place of the one node that reads `weight`."""
        value = self._waiting.pop(weight, None)
        if value is None:
            raise ExportError(
                f"unit {weight!r} meets no node of the graph: the map and its skeleton do not belong together"
            )
        uses = list(value.uses())
        if len(uses) != 1:
            raise ExportError(f"weight {weight!r} is read by {len(uses)} nodes: expected one")
        self._graph.inputs.remove(value)
        old = uses[0].node
        rows = 0
        for segment in segments:
            if segment.placement.start != rows:
                raise ExportError(
                    f"{segment.placement.name} begins at row {segment.placement.start} of {weight!r}: expected {rows}"
                )
            rows += segment.placement.rows
        new = make(old, segments)
        target, result = old.outputs[0], new[-1].outputs[0]
        result.name, result.type, result.shape = target.name, target.type, target.shape
        ir.convenience.replace_all_uses_with(target, result, replace_graph_outputs=True)
        self._graph.insert_before(old, new)
        self._graph.remove(old, safe=False)

    def _multiply(self, old: ir.Node, segments: Sequence[_Segment]) -> list[ir.Node]:
        """The kernels of each segment of a matrix's rows, and what joins their outputs."""
        source = old.inputs[0]
        assert source is not None
        nodes: list[ir.Node] = []
        if len(segments) == 1:
            self._product(nodes, old.name or "", source, segments[0])
            return nodes
        products = [
            self._product(nodes, f"{old.name}/{number}", source, segment) for number, segment in enumerate(segments)
        ]
        return [*nodes, ir.Node("", "Concat", products, [ir.AttrInt64("axis", -1)], name=f"{old.name}/Concat")]

    def _product(self, nodes: list[ir.Node], base: str, source: ir.Value, segment: _Segment) -> ir.Value:
        """Add to `nodes` those that multiply by one segment; the product."""
        unit = segment.placement
        drawing = self._drawing(nodes, base, unit.name, segment)
        return unit.form.draw_product(drawing, source, unit.rows, unit.cols)

    def _gather(self, old: ir.Node, segments: Sequence[_Segment]) -> list[ir.Node]:
        """The token embedding. Each segment is looked up with the indices clipped to its rows, and the one that a token
        falls in is selected."""
        indices = old.inputs[1]
        assert indices is not None
        base = old.name or EMBEDDING
        nodes: list[ir.Node] = []
        if len(segments) == 1:
            self._lookup(nodes, base, indices, segments[0])
            return nodes
        found = []
        for number, segment in enumerate(segments):
            unit, part = segment.placement, f"{base}/{number}"
            first = constant(self._graph, f"{part}/first", unit.start)
            local = ir.Node("", "Sub", [indices, first], name=f"{part}/Sub")
            bounds = [
                constant(self._graph, f"{part}/{role}", bound)
                for role, bound in (("least", 0), ("most", unit.rows - 1))
            ]
            clip = ir.Node("", "Clip", [local.outputs[0], *bounds], name=f"{part}/Clip")
            nodes += [local, clip]
            found.append(self._lookup(nodes, part, clip.outputs[0], segment))
        result = found.pop()
        for number in reversed(range(len(found))):
            part, unit = f"{base}/{number}", segments[number].placement
            end = constant(self._graph, f"{part}/end", unit.start + unit.rows)
            inside = ir.Node("", "Less", [indices, end], name=f"{part}/Less")
            last = constant(self._graph, f"{part}/last", [-1])
            mask = ir.Node("", "Unsqueeze", [inside.outputs[0], last], name=f"{part}/Unsqueeze")
            select = ir.Node("", "Where", [mask.outputs[0], found[number], result], name=f"{part}/Where")
            nodes += [inside, mask, select]
            result = select.outputs[0]
        return nodes

    def _lookup(self, nodes: list[ir.Node], base: str, indices: ir.Value, segment: _Segment) -> ir.Value:
        """Add to `nodes` those that look up rows of one segment; what they find.

        A tied one reads the head's bytes under a shape of its own: the file holds them once, and of the mapping only
        the pages of tokens that occur are touched.
        """
        unit = segment.placement
        if not isinstance(unit.form, TableForm):
            raise ExportError(f"{unit.name}: an embedding cannot be stored as {unit.form.label}")
        drawing = self._drawing(nodes, base, f"{unit.name}.lookup" if unit.tied else unit.name, segment)
        return unit.form.draw_lookup(drawing, indices, unit.cols)

    def _drawing(self, nodes: list[ir.Node], base: str, prefix: str, segment: _Segment) -> NodeDrawing:
        def initializer(name: str, tensor: str, flat: bool) -> ir.Value:
            offset, spec = segment.tensors[tensor]
            shape = (spec.shape[0], math.prod(spec.shape[1:])) if flat else spec.shape
            return self._initializer(name, offset, spec, shape)

        level = self._options.accuracy_level
        return NodeDrawing(self._graph, nodes, initializer, base=base, prefix=prefix, accuracy_level=level)


def _bound_rotary_tables(graph: ir.Graph, context_tokens: int) -> None:
    """Cut the rotary tables to the context: the exporter writes the model's longest, which is memory for nothing."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not name.startswith(ROTARY_PREFIXES) or tensor.shape.numpy()[0] <= context_tokens:
            continue
        cut = ir.Tensor(tensor.numpy()[:context_tokens].copy(), name=name)
        value.const_value, value.shape = cut, cut.shape
