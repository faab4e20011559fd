"""Weights into the skeleton: every matrix node is replaced by the kernel that reads the chosen form.

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
from packager.forms.registry import BlockForm, FloatForm, Form, LowRankForm, PivotForm, SplitForm, TensorSpec
from packager.graph.kv_cache_codes import Scales, quantise_caches
from packager.graph.names import EMBEDDING
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
_ROTARY_PREFIXES = ("cos_cache", "sin_cache")
_DOMAIN = "com.microsoft"


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
    cache_scales: Scales | None = None


def write_model(skeleton: Path, placements: Iterable[Placement], options: GraphOptions, out: Path) -> dict[str, int]:
    """Write `out` and its external data `<out>_data` from a skeleton graph and placed units.

    Returns the bytes written for each unit. Raises ExportError when units and nodes do not match one to one.
    """
    model = ir.load(skeleton)
    _bound_rotary_caches(model.graph, options.context_tokens)
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
                    f"model again"
                )
        return start

    def _external(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, length: int
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(self._location, offset, length, dtype, shape=ir.Shape(shape), name=name)

    def _initializer(self, name: str, at: tuple[int, TensorSpec], shape: tuple[int, ...] | None = None) -> ir.Value:
        """An initializer over bytes already in the file. Two may share the same bytes under two shapes."""
        offset, spec = at
        dtype = _DTYPES[spec.dtype]
        tensor = self._external(name, dtype, shape or spec.shape, offset, spec.bytes)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape or spec.shape), const_value=tensor)
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
        if len(segments) == 1:
            return self._product(old.name or "", source, segments[0])
        nodes, products = [], []
        for number, segment in enumerate(segments):
            nodes += self._product(f"{old.name}/{number}", source, segment)
            products.append(nodes[-1].outputs[0])
        return [*nodes, ir.Node("", "Concat", products, [ir.AttrInt64("axis", -1)], name=f"{old.name}/Concat")]

    def _product(self, base: str, source: ir.Value, segment: _Segment) -> list[ir.Node]:
        """The nodes that multiply by one segment; the last one's output is the product."""
        unit = segment.placement
        match unit.form:
            case FloatForm() | BlockForm() as form:
                return [self._kernel(base, source, segment, form, "", unit.rows, unit.cols)]
            case LowRankForm(rank=rank, factors=form):
                down = self._kernel(f"{base}/down", source, segment, form, "down.", rank, unit.cols)
                return [down, self._kernel(f"{base}/up", down.outputs[0], segment, form, "up.", unit.rows, rank)]
            case PivotForm(rank=rank, factors=form):
                few = self._kernel(f"{base}/base", source, segment, form, "base.", rank, unit.cols)
                rest = self._kernel(f"{base}/rest", few.outputs[0], segment, form, "rest.", unit.rows - rank, rank)
                joined = ir.Node(
                    "", "Concat", [few.outputs[0], rest.outputs[0]], [ir.AttrInt64("axis", -1)], name=f"{base}/Concat"
                )
                order = self._initializer(f"{unit.name}.order", segment.tensors["order"])
                return [
                    few,
                    rest,
                    joined,
                    ir.Node(
                        "", "Gather", [joined.outputs[0], order], [ir.AttrInt64("axis", -1)], name=f"{base}/Gather"
                    ),
                ]
            case SplitForm(high=high, low=low):
                codes, scales = self._split(
                    unit.name, segment, segment.tensors["high"][1].shape, segment.tensors["low"][1].shape
                )
                upper = self._blocks(f"{base}/high", [source, codes[0], scales], high, unit.rows, unit.cols)
                lower = self._blocks(f"{base}/low", [source, codes[1], scales], low, unit.rows, unit.cols)
                return [upper, lower, *self._joined(base, upper, lower)]

    def _kernel(
        self,
        node: str,
        source: ir.Value,
        segment: _Segment,
        form: FloatForm | BlockForm,
        prefix: str,
        rows: int,
        cols: int,
    ) -> ir.Node:
        """The node that multiplies by the (rows, cols) matrix in the segment's tensors whose names start with
        `prefix`."""
        if isinstance(form, FloatForm):
            weight = self._initializer(f"{segment.placement.name}.{prefix}weight", segment.tensors[f"{prefix}weight"])
            return ir.Node(_DOMAIN, "FusedMatMul", [source, weight], [ir.AttrInt64("transB", 1)], name=node)
        inputs: list[ir.Value | None] = [source]
        for part in ("codes", "scales", "zeros") if form.zeros else ("codes", "scales"):
            inputs.append(self._initializer(f"{segment.placement.name}.{prefix}{part}", segment.tensors[prefix + part]))
        return self._blocks(node, inputs, form, rows, cols)

    def _blocks(self, node: str, inputs: Sequence[ir.Value | None], form: BlockForm, rows: int, cols: int) -> ir.Node:
        """A MatMulNBits over codes, scales and zero points."""
        attributes = {
            "K": cols,
            "N": rows,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": self._options.accuracy_level,
        }
        return ir.Node(
            _DOMAIN, "MatMulNBits", inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()], name=node
        )

    def _gather(self, old: ir.Node, segments: Sequence[_Segment]) -> list[ir.Node]:
        """The token embedding. Each segment is looked up with the indices clipped to its rows, and the one that a token
        falls in is selected."""
        indices = old.inputs[1]
        assert indices is not None
        base = old.name or EMBEDDING
        if len(segments) == 1:
            return self._lookup(base, indices, segments[0])
        nodes: list[ir.Node] = []
        found = []
        for number, segment in enumerate(segments):
            unit, part = segment.placement, f"{base}/{number}"
            local = ir.Node("", "Sub", [indices, self._scalar(f"{part}/first", unit.start)], name=f"{part}/Sub")
            bounds = [self._scalar(f"{part}/{role}", bound) for role, bound in (("least", 0), ("most", unit.rows - 1))]
            clip = ir.Node("", "Clip", [local.outputs[0], *bounds], name=f"{part}/Clip")
            nodes += [local, clip, *self._lookup(part, clip.outputs[0], segment)]
            found.append(nodes[-1].outputs[0])
        result = found.pop()
        for number in reversed(range(len(found))):
            part, unit = f"{base}/{number}", segments[number].placement
            inside = ir.Node(
                "", "Less", [indices, self._scalar(f"{part}/end", unit.start + unit.rows)], name=f"{part}/Less"
            )
            mask = ir.Node(
                "", "Unsqueeze", [inside.outputs[0], self._vector(f"{part}/last", -1)], name=f"{part}/Unsqueeze"
            )
            select = ir.Node("", "Where", [mask.outputs[0], found[number], result], name=f"{part}/Where")
            nodes += [inside, mask, select]
            result = select.outputs[0]
        return nodes

    def _lookup(self, base: str, indices: ir.Value, segment: _Segment) -> list[ir.Node]:
        """The nodes that look up rows of one segment.

        A tied one reads the head's bytes under a shape of its own: the file holds them once, and of the mapping only
        the pages of tokens that occur are touched.
        """
        unit = segment.placement
        prefix = f"{unit.name}.lookup" if unit.tied else unit.name
        form = unit.form
        if isinstance(form, FloatForm):
            return [
                ir.Node(
                    "", "Gather", [self._initializer(f"{prefix}.weight", segment.tensors["weight"]), indices], name=base
                )
            ]
        match form:
            case BlockForm():
                shape = segment.tensors["codes"][1].shape
                packed = self._initializer(f"{prefix}.codes", segment.tensors["codes"], (shape[0], shape[1] * shape[2]))
                inputs: list[ir.Value | None] = [
                    packed,
                    indices,
                    self._initializer(f"{prefix}.scales", segment.tensors["scales"]),
                ]
                if form.zeros:
                    inputs.append(self._initializer(f"{prefix}.zeros", segment.tensors["zeros"]))
                gather = self._lookup_blocks(base, inputs, form)
                return [gather, *self._unpadded(base, gather, form, unit.cols)]
            case SplitForm(high=high, low=low):
                flat = [(unit.rows, math.prod(segment.tensors[part][1].shape[1:])) for part in ("high", "low")]
                codes, scales = self._split(prefix, segment, *flat)
                upper = self._lookup_blocks(f"{base}/high", [codes[0], indices, scales], high)
                lower = self._lookup_blocks(f"{base}/low", [codes[1], indices, scales], low)
                nodes = [upper, lower, *self._joined(base, upper, lower)]
                return [*nodes, *self._unpadded(base, nodes[-1], form.high, unit.cols)]
        raise ExportError(f"{unit.name}: an embedding cannot be stored as {form.label}")

    def _lookup_blocks(self, node: str, inputs: Sequence[ir.Value | None], form: BlockForm) -> ir.Node:
        """A GatherBlockQuantized over codes, indices, scales and zero points."""
        attributes = {"bits": form.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}
        return ir.Node(
            _DOMAIN,
            "GatherBlockQuantized",
            inputs,
            [ir.AttrInt64(key, value) for key, value in attributes.items()],
            name=node,
        )

    def _unpadded(self, base: str, rows: ir.Node, form: BlockForm, cols: int) -> list[ir.Node]:
        """The Slice that takes looked-up rows back to `cols` elements, where blocks pad them."""
        if form.blocks(cols) * form.block == cols:
            return []
        bounds = [
            self._vector(f"{base}/{role}", number) for role, number in (("start", 0), ("stop", cols), ("axis", -1))
        ]
        return [ir.Node("", "Slice", [rows.outputs[0], *bounds], name=f"{base}/Slice")]

    def _split(
        self, prefix: str, segment: _Segment, high: tuple[int, ...], low: tuple[int, ...]
    ) -> tuple[list[ir.Value], ir.Value]:
        """Upper and lower codes in the given shapes, and the scales that both share."""
        codes = [
            self._initializer(f"{prefix}.{part}", segment.tensors[part], shape)
            for part, shape in (("high", high), ("low", low))
        ]
        return codes, self._initializer(f"{prefix}.scales", segment.tensors["scales"])

    def _joined(self, base: str, upper: ir.Node, lower: ir.Node) -> list[ir.Node]:
        """Four times what the upper bits make, plus what the lower bits make."""
        four = ir.tensor(4.0, dtype=ir.DataType.FLOAT, name=f"{base}/four")
        value = ir.Value(
            name=f"{base}/four", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]), const_value=four
        )
        self._graph.register_initializer(value)
        scaled = ir.Node("", "Mul", [upper.outputs[0], value], name=f"{base}/Mul")
        return [scaled, ir.Node("", "Add", [scaled.outputs[0], lower.outputs[0]], name=f"{base}/Add")]

    def _scalar(self, name: str, number: int) -> ir.Value:
        return self._integers(name, number, [])

    def _vector(self, name: str, number: int) -> ir.Value:
        return self._integers(name, [number], [1])

    def _integers(self, name: str, content: int | list[int], shape: list[int]) -> ir.Value:
        tensor = ir.tensor(content, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _bound_rotary_caches(graph: ir.Graph, context_tokens: int) -> None:
    """Cut the rotary tables to the context: the exporter writes the model's longest, which is memory for nothing."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not name.startswith(_ROTARY_PREFIXES) or tensor.shape.numpy()[0] <= context_tokens:
            continue
        cut = ir.Tensor(tensor.numpy()[:context_tokens].copy(), name=name)
        value.const_value, value.shape = cut, cut.shape
