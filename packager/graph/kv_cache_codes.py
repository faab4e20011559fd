"""The key/value cache in the exported graph: what reads it, and how to make it one of 8-bit codes.

`GroupQueryAttention` reads and writes a cache of int8 codes where it is given a scale for every channel; the exporter
offers the same by `kv_cache_quant_scheme=int8_per_channel`, but wants the scales before it makes a graph. They differ
only in three attributes, two inputs and the caches' type, so one skeleton serves both: the change is made here.

The exporter also turns `past_present_share_buffer` off for such a graph on the CPU. The kernel needs no such thing: it
compares the addresses of past and present and appends in place where they are one (tests hold its tokens against
torch's), and the cache then lies in memory once instead of twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from packager.errors import ExportError
from packager.graph.names import ATTENTION, CACHE_PREFIX, COSINES, KEY_SCALE, PAST_KEY
from packager.graph.prefill import KvScales, PrefillInputs, branch_on_rows, count_rows, over_floats, unbranch

LayerScales = Mapping[int, KvScales]
"""Layer → the scales of its keys and values."""

_MODE, _BITS = "PER_CHANNEL", 8
_WINDOW = "local_window_size"
_STATE = r"past\.\d+\.(conv|recurrent)"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFacts:
    """What the graph says of its cache: the `layers` that have one; of each head the first `rotary_channels` are
    rotated by position, in pairs of neighbours where `rotary_interleaved`, else a half of them apart. `refusal` says
    why the cache cannot hold codes, empty where it can."""

    layers: tuple[int, ...]
    rotary_channels: int
    rotary_interleaved: bool
    refusal: str = ""


def cache_facts(graph: ir.Graph, provider: str) -> CacheFacts:
    """Facts of a skeleton that was exported for execution provider `provider`."""
    readers = {node.op_type for value in _caches(graph.inputs) for node, _ in value.uses()}
    layers = tuple(
        sorted(_layer(node) for node in graph if node.op_type == ATTENTION and node.inputs[PAST_KEY] is not None)
    )
    refusal = ""
    if provider != "cpu":
        refusal = f"the runtime reads 8-bit caches on the CPU only, this graph is for {provider}"
    elif readers != {ATTENTION}:
        refusal = f"its caches are read by {', '.join(sorted(readers)) or 'nothing'}, only {ATTENTION} reads 8-bit ones"
    elif state_bytes(graph):
        refusal = "some of its layers keep states of another kind beside the caches of the others"
    channels, interleaved = 0, False
    for node in graph:
        table = (
            node.inputs[COSINES]
            if node.op_type == ATTENTION
            else node.inputs[2]
            if node.op_type == "RotaryEmbedding"
            else None
        )
        if table is not None and table.shape is not None and isinstance(table.shape[1], int):
            channels = max(channels, 2 * table.shape[1])
            flag = node.attributes.get("rotary_interleaved" if node.op_type == ATTENTION else "interleaved")
            interleaved = interleaved or bool(flag and flag.as_int())
    return CacheFacts(layers=layers, rotary_channels=channels, rotary_interleaved=interleaved, refusal=refusal)


def state_bytes(graph: ir.Graph) -> int:
    """What the states of convolutions and linear attention that `graph` reads for one sequence take, in float32."""
    shapes = [value.shape for value in graph.inputs if value.name and re.fullmatch(_STATE, value.name) and value.shape]
    return sum(4 * math.prod(size for size in shape if isinstance(size, int)) for shape in shapes)


def quantise_caches(graph: ir.Graph, scales: LayerScales) -> None:
    """Make every cache of `graph` one of int8 codes. ExportError when layers and `scales` do not match one to one."""
    nodes = {_layer(node): node for node in graph if node.op_type == ATTENTION}
    if set(nodes) != set(scales):
        raise ExportError(
            f"the graph has caches in layers {sorted(nodes)}, the map has scales for {sorted(scales)}: they do not "
            "belong together"
        )
    prefills: dict[int, PrefillInputs] = {}
    for layer, node in nodes.items():
        # A sliding layer's buffer may be one that rolls.
        full = node.attributes.get_int(_WINDOW, -1) <= 0
        if full and (heads := len(scales[layer][0])) not in prefills:
            prefills[heads] = count_rows(graph, node, heads)
        floats = over_floats(graph, node, scales[layer], prefills[heads]) if full else None
        node.resize_inputs(max(len(node.inputs), KEY_SCALE + 2))
        for offset, (role, scale) in enumerate(zip(("k", "v"), scales[layer], strict=True)):
            tensor = ir.Tensor(scale.reshape(-1), name=f"model.layers.{layer}.attn.{role}_scale")
            value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            graph.register_initializer(value)
            node.replace_input_with(KEY_SCALE + offset, value)
            node.attributes.add(ir.AttrString(f"{role}_quant_type", _MODE))
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", _BITS))
        if floats is not None:
            branch_on_rows(graph, node, floats, prefills[heads])
    for value in _caches([*graph.inputs, *graph.outputs]):
        value.type = ir.TensorType(ir.DataType.INT8)


def widen_caches(graph: ir.Graph) -> None:
    """Undo `quantise_caches`: every cache of `graph` holds floats."""
    unbranch(graph)
    for node in graph:
        if node.op_type == ATTENTION and "kv_cache_bit_width" in node.attributes:
            for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
                del node.attributes[name]
            for index in (KEY_SCALE, KEY_SCALE + 1):
                node.replace_input_with(index, None)
    for value in _caches([*graph.inputs, *graph.outputs]):
        if value.dtype == ir.DataType.INT8:
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _caches(values: Iterable[ir.Value]) -> list[ir.Value]:
    return [value for value in values if value.name and value.name.startswith((CACHE_PREFIX, "present."))]


def _layer(node: ir.Node) -> int:
    """The layer of an attention node, from the name of the cache that it reads: `past_key_values.LAYER.key`."""
    past = node.inputs[PAST_KEY]
    if past is None or past.name is None:
        raise ExportError(f"attention {node.name} reads no cache")
    return int(past.name.split(".")[1])
