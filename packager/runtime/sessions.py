"""Decoders on ONNX Runtime: every token's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from packager.errors import RuntimeCheckError
from packager.graph.kv_cache_codes import widen_caches
from packager.graph.names import CACHE_PREFIX

_PRUNE = "/lm_head/prune/Gather"
_UNSQUEEZE = "/lm_head/prune/Unsqueeze"


def token_losses(logits: NDArray[np.float32], window: NDArray[np.int64]) -> NDArray[np.float32]:
    """Cross-entropy in nats of each token of a (length,) window but its first, from (length, vocabulary) logits."""
    shifted = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    chosen = shifted[np.arange(len(window) - 1), window[1:]]
    losses: NDArray[np.float32] = np.log(np.exp(shifted).sum(-1)) - chosen
    return losses


def graph_losses(
    graph: Path, windows: NDArray[np.int64], *, cache_width: int = 0, advance: Callable[[], None] = lambda: None
) -> NDArray[np.float32]:
    """Cross-entropy in nats of each token but the first of (n, length) windows, (n, length - 1), of a decoder's graph.

    `advance` is called after each window; `cache_width` is for graphs that leave it open.
    """
    session, losses = full_logits_session(graph), []
    for window in windows:
        losses.append(token_losses(run_window(session, window, cache_width=cache_width), window))
        advance()
    return np.stack(losses)


def run_window(
    session: ort.InferenceSession, window: NDArray[np.int64], *, cache_width: int = 0
) -> NDArray[np.float32]:
    """Logits (length, vocabulary) of one window from an empty cache, `cache_width` wide where the graph leaves
    it open."""
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            feeds[value.name] = window[None]
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((1, len(window)), np.int64)
        elif value.name == "position_ids":
            positions = np.arange(len(window), dtype=np.int64)[None]
            # Text has the same position thrice where a model counts pictures in rows and columns beside it.
            feeds[value.name] = positions if len(value.shape) == 2 else np.stack([positions] * value.shape[0])
        else:
            shape = [1, *value.shape[1:]]
            if value.name.startswith(CACHE_PREFIX):  # others are states of convolutions and linear attention
                shape[2:] = [0, shape[3] if isinstance(shape[3], int) else cache_width]
            feeds[value.name] = np.zeros(
                shape, {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}[value.type]
            )
    logits: NDArray[np.float32] = session.run(["logits"], feeds)[0][0]
    return logits


def full_logits_session(graph_path: Path, *, threads: int = 0, float_kernels: bool = False) -> ort.InferenceSession:
    """A session over a decoder's graph that returns every token's logits, not only the last's.

    With `float_kernels` the low-bit kernels are told to keep activations in float32, and the cache holds floats: slow,
    and exact enough to tell a wrong graph from rounded activations.
    """
    model = ir.load(graph_path)
    nodes = {node.name: node for node in model.graph}
    if _PRUNE in nodes and _UNSQUEEZE in nodes:
        every_row = nodes[_PRUNE].inputs[0]
        assert every_row is not None
        ir.convenience.replace_all_uses_with(nodes[_UNSQUEEZE].outputs[0], every_row)
        model.graph.remove([nodes[_UNSQUEEZE], nodes[_PRUNE]], safe=True)
    if float_kernels:
        for node in model.graph:
            if node.op_type == "MatMulNBits":
                node.attributes.add(ir.AttrInt64("accuracy_level", 1))
        widen_caches(model.graph)
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    if logits.shape is not None:
        logits.shape = ir.Shape(["batch_size", "sequence_length", logits.shape[2]])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph_path.parent))
    try:
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RuntimeCheckError(f"ONNX Runtime refuses {graph_path}: {str(error)[:300]}") from error
