"""Prefill over a cache of codes: the branch over floats writes what the kernel over codes writes, where it may
serve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import Pico
from numpy.typing import NDArray
from test_surgery import FLOAT_KERNELS, build, export, place

from packager.bundle.folder import GRAPH_FILE
from packager.graph.kv_cache_codes import cache_facts
from packager.graph.names import GRAPH_FILE as SKELETON_FILE
from packager.graph.prefill import unbranch
from packager.scoring.kv_cache_price import measure_steps

BUFFER = 128
IDS = np.random.default_rng(3).integers(2, 384, BUFFER)
PIECES = (32, 32, 1, 1, 9, 1, 24)
"""Rows of each run: chunks of a prompt, tokens of an answer, another turn in one piece and its answer, and a third."""
BRANCHES = {"llama": 2, "mistral": 0, "qwen2": 2, "qwen3": 2, "gemma3": 1, "phi3": 2, "smollm3": 2}
"""Layers whose attention is an `If`: those without a sliding window."""

Caches = Mapping[str, NDArray[Any]]


def graphs(pico: Pico, folder: Path) -> tuple[ir.Model, ir.Model]:
    """A pico's graph with float weights over a cache of codes, and the same with no branches."""
    skeleton = export(pico.model, folder / "skeleton")
    facts = cache_facts(ir.load(skeleton.folder / SKELETON_FILE).graph, "cpu")
    steps = measure_steps(pico.model, torch.from_numpy(np.random.default_rng(5).integers(2, 384, (2, 100))), facts)
    scales = {layer: (keys.numpy(), values.numpy()) for layer, (keys, values) in steps.items()}
    placements, _ = place(skeleton, lambda source: "f32", folder)
    build(skeleton, placements, folder / "bundle", dataclasses.replace(FLOAT_KERNELS, cache_scales=scales))
    branched, plain = (ir.load(folder / "bundle" / GRAPH_FILE) for _ in range(2))
    unbranch(plain.graph)
    return branched, plain


def session(model: ir.Model, folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder / "bundle" / Path(GRAPH_FILE).parent)
    )
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds_of(runner: ort.InferenceSession, start: int, end: int) -> dict[str, NDArray[np.int64]]:
    every = {
        "input_ids": IDS[None, start:end],
        "attention_mask": np.ones((1, end), np.int64),
        "position_ids": np.arange(start, end)[None],
    }
    return {value.name: every[value.name] for value in runner.get_inputs() if value.name in every}


def empty(runner: ort.InferenceSession, rows: int) -> dict[str, NDArray[np.int8]]:
    return {
        value.name: np.zeros((1, value.shape[1], rows, value.shape[3]), np.int8)
        for value in runner.get_inputs()
        if value.type == "tensor(int8)"
    }


def in_one_buffer(runner: ort.InferenceSession) -> tuple[list[NDArray[np.float32]], Caches]:
    """Each run's logits, and the caches in the end, where past and present are one buffer as onnxruntime-genai has
    them."""
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(cache) for name, cache in empty(runner, BUFFER).items()}
    logits, start = [], 0
    for rows in PIECES:
        binding = runner.io_binding()
        for name, feed in feeds_of(runner, start, start + rows).items():
            binding.bind_cpu_input(name, feed)
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        runner.run_with_iobinding(binding)
        logits.append(next(value.numpy().copy() for value in binding.get_outputs() if value.shape()[-1] == 384))
        start += rows
    return logits, {name: buffer.numpy().copy() for name, buffer in buffers.items()}


def in_two_buffers(runner: ort.InferenceSession) -> tuple[list[NDArray[np.float32]], Caches]:
    """The same where every present is a new array."""
    caches = empty(runner, 0)
    logits, start = [], 0
    for rows in PIECES:
        names = [value.name for value in runner.get_outputs()]
        found = dict(zip(names, runner.run(names, {**feeds_of(runner, start, start + rows), **caches}), strict=True))
        logits.append(found["logits"])
        caches = {name: found[name.replace("past_key_values", "present")] for name in caches}
        start += rows
    return logits, caches


def test_the_branch_writes_the_kernels_codes(pico: Pico, tmp_path: Path) -> None:
    branched, plain = graphs(pico, tmp_path)
    assert sum(node.op_type == "If" for node in branched.graph) == BRANCHES[pico.name]
    assert not any(node.op_type == "If" for node in plain.graph)
    first, second = session(branched, tmp_path), session(plain, tmp_path)
    (found, caches), (expected, codes) = in_one_buffer(first), in_one_buffer(second)
    filled = sum(PIECES)
    for name, cache in caches.items():
        assert not cache[:, :, filled:].any(), "written beyond its rows"
        assert cache[:, :, :filled].any(axis=(1, 3)).all(), "rows left out"
        apart = cache.astype(np.int16) - codes[name]
        if ".0." in name:
            assert not apart.any(), "the first layer sees the same keys and values: its codes are the same, bit for bit"
        else:
            # The kernel reads a chunk's own rows as codes, the branch as floats: what comes after it differs by that
            # rounding.
            assert np.abs(apart).mean() < 0.5
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).mean() < 0.1 * theirs.std()


def test_two_buffers_are_the_kernels(pico: Pico, tmp_path: Path) -> None:
    branched, plain = (session(model, tmp_path) for model in graphs(pico, tmp_path))
    (found, caches), (expected, codes) = in_two_buffers(branched), in_two_buffers(plain)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)
    assert all(np.array_equal(cache, codes[name]) for name, cache in caches.items())


@pytest.mark.parametrize("rows", [0, 96])
def test_several_sequences_are_the_kernels(rows: int, picos: Callable[[str], Pico], tmp_path: Path) -> None:
    """Each may have a past of its own: even in one long buffer the branch does not serve them."""
    branched, plain = (session(model, tmp_path) for model in graphs(picos("llama"), tmp_path))
    feeds = {
        name: np.repeat(feed, 2, axis=0)
        for name, feed in {**feeds_of(branched, 0, 40), **empty(branched, rows)}.items()
    }
    names = [value.name for value in branched.get_outputs()]
    for ours, theirs in zip(branched.run(names, feeds), plain.run(names, feeds), strict=True):
        assert np.array_equal(ours, theirs)
