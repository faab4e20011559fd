"""Models made up from a configuration: any shape, random weights and tokens, no download.

They are for measuring what a machine's runtime does with a shape. Each becomes a bundle that the runtime opens.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from packager.forms.kinds import Kind
from packager.forms.registry import Form
from packager.graph.names import EMBEDDING, HEAD
from packager.graph.skeleton import GENAI_FILE, GRAPH_FILE, Matrix, export_skeleton
from packager.graph.surgery import GraphOptions, Placement, write_model
from packager.io.files import read_json
from packager.io.safetensors_ranges import Region
from packager.memory.fit import Workload, WorkUnit
from packager.memory.geometry import Geometry, read_geometry
from packager.profile import FLOAT, INT8
from packager.runtime.memory_probe import NEW_TOKENS, PROMPT_FILE

_STEP = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A model without weights: its exported graph in `folder`, the matrices that it awaits, and a tokenizer."""

    name: str
    folder: Path
    matrices: tuple[Matrix, ...]
    tied: bool
    geometry: Geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """How a sample is run: linear units in form `form`, embedding and head in `head`, a `cache` of floats or of int8
    codes. `threads` 0 leaves them to the runtime."""

    form: Form
    head: Form
    context_tokens: int
    prompt_tokens: int
    chunk_tokens: int
    accuracy_level: int = 4
    threads: int = 0
    cache: str = FLOAT


def make_config(values: dict[str, Any]) -> PretrainedConfig:
    """A configuration from `model_type` and what differs from that type's defaults; contexts up to 8,192."""
    config: PretrainedConfig = AutoConfig.for_model(**{"max_position_embeddings": 8192, **values})
    return config


def make_sample(
    name: str, config: PretrainedConfig, folder: Path, *, tokenizer: Path | None = None, tokens: int = 0
) -> Sample:
    """The graph of `config` and a tokenizer: the file `tokenizer`, or one of `tokens` made-up tokens (0: the
    vocabulary's)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 0, 0
    vectors = {key: torch.ones(value.shape) for key, value in model.named_parameters() if value.dim() == 1}
    matrices, nodes = export_skeleton(config, vectors, "cpu", folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    else:
        _make_tokenizer(tokens or config.vocab_size, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>"}),
        encoding="utf-8",
    )
    geometry = read_geometry(
        config, nodes=nodes, tokenizer=folder / "tokenizer.json", genai=read_json(folder / GENAI_FILE)
    )
    return Sample(
        name=name, folder=folder, matrices=tuple(matrices), tied=bool(config.tie_word_embeddings), geometry=geometry
    )


def workload(sample: Sample, case: Case) -> Workload:
    """What the memory model has to know of the sample's process; a tied embedding and head are one unit."""
    kinds: dict[str, Kind] = {EMBEDDING: "embedding", HEAD: "tied" if sample.tied else "head"}
    kept = [matrix for matrix in sample.matrices if not (sample.tied and matrix.name == EMBEDDING)]
    return Workload(
        geometry=replace(sample.geometry, cache_element_bytes=1 if case.cache == INT8 else 0),
        units=tuple(
            WorkUnit(
                name=m.name,
                rows=m.rows,
                cols=m.cols,
                form=case.head if m.name in kinds else case.form,
                kind=kinds.get(m.name, "linear"),
            )
            for m in kept
        ),
        context_tokens=case.context_tokens,
        prompt_tokens=case.prompt_tokens,
        used_tokens=min(case.context_tokens, case.prompt_tokens + NEW_TOKENS),
        chunk_tokens=case.chunk_tokens,
    )


def write_sample(sample: Sample, case: Case, out: Path) -> None:
    """A bundle of random weights in the new folder `out`, bounded to the case's context, with a prompt beside it."""
    out.mkdir()
    units = workload(sample, case).units
    pools = {"uint8": out / "codes", "float32": out / "floats"}
    dice = np.random.default_rng(0)
    largest = {
        dtype: max(
            [s.bytes for u in units for s in u.form.tensors(u.rows, u.cols).values() if s.dtype == dtype], default=0
        )
        for dtype in pools
    }
    # Each unit starts elsewhere in the pool: the runtime keeps repacked weights of equal bytes only once.
    spare = len(units) * _STEP
    pools["uint8"].write_bytes(dice.bytes(largest["uint8"] + spare))
    block = (dice.random(1 << 20, dtype=np.float32) * 0.01).tobytes()
    with pools["float32"].open("wb") as file:
        while file.tell() < largest["float32"] + spare:
            file.write(block)
    placements = []
    for at, unit in enumerate(units):
        specs = unit.form.tensors(unit.rows, unit.cols)
        regions = {
            name: Region(path=pools[spec.dtype], offset=at * _STEP, length=spec.bytes) for name, spec in specs.items()
        }
        placements.append(
            Placement(
                name=unit.name,
                matrix=unit.name,
                start=0,
                tied=unit.kind == "tied",
                rows=unit.rows,
                cols=unit.cols,
                form=unit.form,
                regions=regions,
            )
        )
    geometry = sample.geometry
    step = np.full((geometry.kv_heads, geometry.head_dim), 0.05, np.float32)
    scales = dict.fromkeys(range(geometry.layers), (step, step)) if case.cache == INT8 else None
    options = GraphOptions(context_tokens=case.context_tokens, accuracy_level=case.accuracy_level, cache_scales=scales)
    write_model(sample.folder / GRAPH_FILE, placements, options, out / "model.onnx")
    for pool in pools.values():
        pool.unlink()
    genai = read_json(sample.folder / GENAI_FILE)
    genai["model"]["decoder"]["filename"] = "model.onnx"
    if case.cache == INT8:
        genai["model"]["decoder"]["session_options"]["enable_mem_pattern"] = False
    if case.threads:
        genai["model"]["decoder"]["session_options"]["intra_op_num_threads"] = case.threads
    genai["model"]["context_length"] = case.context_tokens
    # min_length: random weights may say stop at once.
    genai["search"] |= {
        "max_length": case.context_tokens,
        "min_length": case.context_tokens,
        "chunk_size": case.chunk_tokens,
    }
    (out / GENAI_FILE).write_text(json.dumps(genai), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sample.folder / name, out)
    # Frequent tokens have low ids. This exponent touches as many pages of an embedding as English text and Python code
    # do.
    weights = (np.arange(sample.geometry.vocab) + 2.7) ** -1.15
    np.save(
        out / PROMPT_FILE,
        dice.choice(sample.geometry.vocab, case.prompt_tokens, p=weights / weights.sum()).astype(np.int32),
    )


def _make_tokenizer(vocab_size: int, path: Path) -> None:
    """A byte-level BPE of `vocab_size` made-up tokens, each with the merge that makes it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    dice = random.Random(0)
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    parts, known, merges = tokens[1:], set(tokens), []
    while len(tokens) < vocab_size:
        left, right = (parts[int(len(parts) * dice.random() ** skew)] for skew in (1.5, 3.0))
        if (token := left + right) not in known and len(token) <= 12:
            known.add(token)
            tokens.append(token)
            parts.append(token)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[0], special=True)])
    tokenizer.save(str(path))
