"""Weights into the skeleton: every matrix node is replaced by the kernel that reads the chosen form.

The bytes of a tensor are not interpreted here: they are copied from where they lie into one external data file, so
building a size costs what copying it costs. A unit that meets no node, or a node that meets no unit, is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from packager.errors import ExportError
from packager.forms import BlockForm, FloatForm, Form, LowRankForm, TensorSpec
from packager.graph.layout import EMBEDDING, HEAD
from packager.store import Region

_DTYPES = {"uint8": ir.DataType.UINT8, "float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}
_ALIGNMENT = 64
_INLINE_LIMIT = 1024
_ROTARY_PREFIXES = ("cos_cache", "sin_cache")
_DOMAIN = "com.microsoft"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """One unit in its chosen form, and where each of its tensors lies."""

    name: str
    tied: bool
    rows: int
    cols: int
    form: Form
    regions: Mapping[str, Region]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphOptions:
    """What the graph is bounded to: `context_tokens` positions, kernels at `accuracy_level` (4: 8-bit activations)."""

    context_tokens: int
    accuracy_level: int


def write_model(skeleton: Path, placements: Iterable[Placement], options: GraphOptions, out: Path) -> dict[str, int]:
    """Write `out` and its external data `<out>_data` from a skeleton graph and placed units.

    Returns the bytes written for each unit. Raises ExportError when units and nodes do not match one to one.
    """
    model = ir.load(skeleton)
    _bound_rotary_caches(model.graph, options.context_tokens)
    _open_wide_windows(model.graph, options.context_tokens)
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


class _Surgeon:
    """One pass over one graph: holds the data file's end and the weights still waiting for their unit."""

    def __init__(self, graph: ir.Graph, data: BinaryIO, location: str, options: GraphOptions) -> None:
        self._graph = graph
        self._data = data
        self._location = location
        self._options = options
        names = {value.name: value for value in graph.inputs if value.name and value.name.endswith(".weight")}
        self._waiting: dict[str, ir.Value] = names

    def place(self, placement: Placement) -> int:
        """Copy the unit's bytes and rewire its nodes. Returns the bytes written."""
        written, tensors = 0, {}
        specs = placement.form.tensors(placement.rows, placement.cols)
        if set(specs) != set(placement.regions):
            raise ExportError(f"{placement.name}: form {placement.form.label} needs tensors {sorted(specs)}, the store has {sorted(placement.regions)}")
        for name, spec in specs.items():
            region = placement.regions[name]
            if region.length != spec.bytes:
                raise ExportError(f"{placement.name}.{name}: expected {spec.bytes} bytes for {spec.shape}, the store has {region.length}")
            tensors[name] = (self._copy(region), spec)
            written += spec.bytes
        if placement.name == EMBEDDING or placement.tied:
            self._place_gather(placement, tensors)
        if placement.name != EMBEDDING or placement.tied:
            self._place_matmul(placement, tensors)
        return written

    def finish(self) -> None:
        """Every weight must have met its unit."""
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
        self._data.flush()
        with region.path.open("rb") as source:
            offset, left = region.offset, region.length
            while left:
                moved = os.sendfile(self._data.fileno(), source.fileno(), offset, left)
                if not moved:
                    raise ExportError(f"{region.path} ends before byte {region.offset + region.length}: it is cut short, score the model again")
                offset, left = offset + moved, left - moved
        self._data.seek(0, os.SEEK_END)
        return start

    def _external(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int, length: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(self._location, offset, length, dtype, shape=ir.Shape(shape), name=name)

    def _initializer(self, name: str, at: tuple[int, TensorSpec], shape: tuple[int, ...] | None = None) -> ir.Value:
        """An initializer over bytes already in the file. Two may share the same bytes under two shapes."""
        offset, spec = at
        dtype = _DTYPES[spec.dtype]
        tensor = self._external(name, dtype, shape or spec.shape, offset, spec.bytes)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape or spec.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _take(self, weight: str) -> ir.Node:
        """The one node that reads graph weight `weight`, which no longer waits."""
        value = self._waiting.pop(weight, None)
        if value is None:
            raise ExportError(f"unit {weight!r} meets no node of the graph: the map and its skeleton do not belong together")
        uses = list(value.uses())
        if len(uses) != 1:
            raise ExportError(f"weight {weight!r} is read by {len(uses)} nodes: expected one")
        self._graph.inputs.remove(value)
        return uses[0].node

    def _replace(self, old: ir.Node, new: list[ir.Node]) -> None:
        """Put `new` in the place of `old`; the last new node takes over its output, name and all."""
        target, result = old.outputs[0], new[-1].outputs[0]
        result.name, result.type, result.shape = target.name, target.type, target.shape
        ir.convenience.replace_all_uses_with(target, result, replace_graph_outputs=True)
        self._graph.insert_before(old, new)
        self._graph.remove(old, safe=False)

    def _place_matmul(self, placement: Placement, tensors: dict[str, tuple[int, TensorSpec]]) -> None:
        name = HEAD if placement.tied else placement.name
        old = self._take(f"{name}.MatMul.weight")
        source = old.inputs[0]
        assert source is not None
        base = old.name or name
        match placement.form:
            case FloatForm():
                weight = self._initializer(f"{name}.weight", tensors["weight"])
                new = [ir.Node(_DOMAIN, "FusedMatMul", [source, weight], [ir.AttrInt64("transB", 1)], name=base)]
            case BlockForm() as form:
                new = [self._blocks_node(base, name, source, form, "", tensors, placement.rows, placement.cols)]
            case LowRankForm(rank=rank, factors=form):
                down = self._blocks_node(f"{base}/down", f"{name}.down", source, form, "down.", tensors, rank, placement.cols)
                inner = down.outputs[0]
                inner.type, inner.name = source.type, f"{base}/down/output_0"
                new = [down, self._blocks_node(f"{base}/up", f"{name}.up", inner, form, "up.", tensors, placement.rows, rank)]
        self._replace(old, new)

    def _blocks_node(
        self,
        node: str,
        name: str,
        source: ir.Value,
        form: BlockForm,
        prefix: str,
        tensors: dict[str, tuple[int, TensorSpec]],
        rows: int,
        cols: int,
    ) -> ir.Node:
        """A MatMulNBits over the tensors whose names start with `prefix`."""
        inputs: list[ir.Value | None] = [source]
        for part in ("codes", "scales", "zeros") if form.zeros else ("codes", "scales"):
            inputs.append(self._initializer(f"{name}.{part}", tensors[prefix + part]))
        attributes = {
            "K": cols,
            "N": rows,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": self._options.accuracy_level,
        }
        return ir.Node(_DOMAIN, "MatMulNBits", inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()], name=node)

    def _place_gather(self, placement: Placement, tensors: dict[str, tuple[int, TensorSpec]]) -> None:
        """The token embedding. Tied to the head, it reads the head's bytes under a shape of its own: the file holds
        them once, and the mapping's pages are only touched for the tokens that occur."""
        old = self._take(f"{EMBEDDING}.weight")
        indices = old.inputs[1]
        assert indices is not None
        base = old.name or EMBEDDING
        if isinstance(placement.form, FloatForm):
            table = self._initializer(f"{EMBEDDING}.weight", tensors["weight"])
            self._replace(old, [ir.Node("", "Gather", [table, indices], name=base)])
            return
        if not isinstance(placement.form, BlockForm):
            raise ExportError(f"{placement.name}: an embedding cannot be stored as {placement.form.label}")
        form = placement.form
        spec = tensors["codes"][1]
        codes = self._initializer(f"{EMBEDDING}.codes", tensors["codes"], (spec.shape[0], spec.shape[1] * spec.shape[2]))
        inputs: list[ir.Value | None] = [codes, indices, self._initializer(f"{EMBEDDING}.scales", tensors["scales"])]
        if form.zeros:
            inputs.append(self._initializer(f"{EMBEDDING}.zeros", tensors["zeros"]))
        attributes = {"bits": form.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}
        gather = ir.Node(_DOMAIN, "GatherBlockQuantized", inputs, [ir.AttrInt64(key, value) for key, value in attributes.items()], name=base)
        nodes = [gather]
        if form.blocks(placement.cols) * form.block != placement.cols:
            gather.outputs[0].type, gather.outputs[0].name = old.outputs[0].type, f"{base}/padded"
            bounds = [self._constant(f"{base}/{role}", number) for role, number in (("start", 0), ("end", placement.cols), ("axis", -1))]
            nodes.append(ir.Node("", "Slice", [gather.outputs[0], *bounds], name=f"{base}/Slice"))
        self._replace(old, nodes)

    def _constant(self, name: str, number: int) -> ir.Value:
        tensor = ir.tensor([number], dtype=ir.DataType.INT64, name=name)
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]), const_value=tensor)
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


def _open_wide_windows(graph: ir.Graph, context_tokens: int) -> None:
    """Make layers whose window spans the whole context ordinary ones: nothing slides there.

    A windowed cache is only read by onnxruntime-genai, and only while it is no shorter than the window.
    """
    for node in graph:
        window = node.attributes.get("local_window_size")
        if window is not None and window.as_int() >= context_tokens:
            node.attributes.pop("sliding_window_cache", None)
            node.attributes.add(ir.AttrInt64("local_window_size", -1))
