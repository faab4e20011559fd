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
from packager.graph.names import EMBEDDING, GENAI_FILE, GRAPH_FILE, HEAD
from packager.graph.skeleton import Matrix, export_skeleton, side_parameters
from packager.graph.surgery import GraphOptions, Placement, write_model
from packager.io.files import read_json
from packager.io.safetensors_ranges import Region
from packager.memory.fit import Workload, WorkUnit
from packager.memory.geometry import Geometry, read_geometry
from packager.profile import FLOAT, INT8
from packager.runtime.genai_config import GenaiBounds, bounded_config
from packager.runtime.memory_probe import NEW_TOKENS, PROMPT_FILE

_GRAPH_FILE = "model.onnx"
_STEP = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticModel:
    """A model without weights: its exported graph in `folder`, the matrices that it awaits, and a tokenizer."""

    name: str
    folder: Path
    matrices: tuple[Matrix, ...]
    tied: bool
    geometry: Geometry


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessSettings:
    """How a model is run: linear units in form `form`, embedding and head in `head`, a `kv_cache` of floats or of int8
    codes. `threads` 0 leaves them to the runtime."""

    form: Form
    head: Form
    context_tokens: int
    prompt_tokens: int
    chunk_tokens: int
    accuracy_level: int = 4
    threads: int = 0
    kv_cache: str = FLOAT


def make_config(values: dict[str, Any]) -> PretrainedConfig:
    """A configuration from `model_type` and what differs from that type's defaults; contexts up to 8,192."""
    config: PretrainedConfig = AutoConfig.for_model(**{"max_position_embeddings": 8192, **values})
    return config


def make_synthetic(
    name: str, config: PretrainedConfig, folder: Path, *, tokenizer: Path | None = None, tokens: int = 0
) -> SyntheticModel:
    """The graph of `config` and a tokenizer: the file `tokenizer`, or one of `tokens` made-up tokens (0: the
    vocabulary's)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 0, 0
    vectors = {key: torch.ones(value.shape) for key, value in side_parameters(model)}
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
    return SyntheticModel(
        name=name, folder=folder, matrices=tuple(matrices), tied=bool(config.tie_word_embeddings), geometry=geometry
    )


def workload(model: SyntheticModel, settings: ProcessSettings) -> Workload:
    """What the memory model has to know of the model's process; a tied embedding and head are one unit."""
    kinds: dict[str, Kind] = {EMBEDDING: "embedding", HEAD: "tied" if model.tied else "head"}
    kept = [matrix for matrix in model.matrices if not (model.tied and matrix.name == EMBEDDING)]
    return Workload(
        geometry=replace(model.geometry, cache_element_bytes=1 if settings.kv_cache == INT8 else 0),
        units=tuple(
            WorkUnit(
                name=m.name,
                rows=m.rows,
                cols=m.cols,
                form=settings.head if m.name in kinds else settings.form,
                kind=kinds.get(m.name, "linear"),
            )
            for m in kept
        ),
        context_tokens=settings.context_tokens,
        prompt_tokens=settings.prompt_tokens,
        used_tokens=min(settings.context_tokens, settings.prompt_tokens + NEW_TOKENS),
        chunk_tokens=settings.chunk_tokens,
    )


def write_synthetic(model: SyntheticModel, settings: ProcessSettings, out: Path) -> None:
    """A bundle of random weights in the new folder `out`, bounded to the settings' context, with a prompt beside it."""
    out.mkdir()
    units = workload(model, settings).units
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
    geometry = model.geometry
    scale = np.full((geometry.kv_heads, geometry.head_dim), 0.05, np.float32)
    scales = dict.fromkeys(range(geometry.layers), (scale, scale)) if settings.kv_cache == INT8 else None
    options = GraphOptions(
        context_tokens=settings.context_tokens, accuracy_level=settings.accuracy_level, cache_scales=scales
    )
    write_model(model.folder / GRAPH_FILE, placements, options, out / _GRAPH_FILE)
    for pool in pools.values():
        pool.unlink()
    bounds = GenaiBounds(
        graph_file=_GRAPH_FILE,
        context_tokens=settings.context_tokens,
        chunk_tokens=settings.chunk_tokens,
        kv_cache=settings.kv_cache,
        threads=settings.threads,
    )
    genai = bounded_config(read_json(model.folder / GENAI_FILE), bounds)
    # Random weights may say stop at once.
    genai["search"]["min_length"] = settings.context_tokens
    (out / GENAI_FILE).write_text(json.dumps(genai), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model.folder / name, out)
    # Frequent tokens have low ids. This exponent touches as many pages of an embedding as English text and Python code
    # do.
    weights = (np.arange(model.geometry.vocab) + 2.7) ** -1.15
    np.save(
        out / PROMPT_FILE,
        dice.choice(model.geometry.vocab, settings.prompt_tokens, p=weights / weights.sum()).astype(np.int32),
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
