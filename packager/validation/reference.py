"""The torch model that computes with a bundle's very weights, dequantised: what the runtime is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from packager.bundle.manifest import Manifest
from packager.bundle.writer import GRAPH_FILE, REFERENCE_FILE
from packager.errors import ArtifactError
from packager.forms.packing import dequantize
from packager.forms.registry import Form
from packager.graph.kv_cache_codes import read_scales
from packager.profile import INT8
from packager.source.kv_cache_rounding import cache_keyword, rounding, tap
from packager.source.unit_weights import find_sources, matrices_of

PROMPTS = (
    "The three most important things to check before a long journey are",
    "def fibonacci(n):\n    ",
    "In 1969, the first people to walk on the Moon",
)
TEXTS = (
    "Plain English, with punctuation; and a dash - or two.",
    "Numbers: 0 7 42 1969 3.14159 1,000,000 2026-11-21 0xFF",
    "Accents: naïve café Ångström Žižek résumé",
    "日本語と中文 和 한국어",
    "Emoji: 🚀 👩‍👩‍👧 🇨🇭 ✅",
    "Runs   of    white\t\tspace\n\n\nand lines\r\n end ",
    "code: for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
)
GREEDY_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A torch model with a bundle's weights, whose cache rounds as the bundle's does, and its tokenizer.

    `heldout` (n, length) are the held-out windows of its map, cut to the bundle's context; `source_nats`
    (n, length - 1) is what each of their tokens costs the source model.
    """

    model: torch.nn.Module
    tokenizer: Any
    heldout: torch.Tensor
    source_nats: torch.Tensor

    @torch.no_grad()
    def exact_logits(self, window: torch.Tensor) -> torch.Tensor:
        """Logits (length, vocabulary) of a (length,) window where nothing that is cached is rounded."""
        nothing = {cache_keyword(self.model): DynamicCache()}
        logits: torch.Tensor = self.model(input_ids=window[None], **nothing).logits[0].float()
        return logits


def load_reference(root: Path, manifest: Manifest) -> Reference:
    """Rebuild the bundle in `root` in torch: architecture from config.json, vectors from reference.safetensors, every
    matrix dequantised from the bytes of the graph's weights."""
    stored = load_file(root / REFERENCE_FILE)
    config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    sources = find_sources(matrices_of((unit.matrix, unit.rows, unit.cols) for unit in manifest.units), model)
    graph = ir.load(root / GRAPH_FILE).graph
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.from_numpy(stored[f"vector.{name}"]))
        for source, unit in zip(sources, manifest.units, strict=True):
            weights = _weights(graph, unit.name, unit.parsed(), unit.rows, unit.cols)
            source.weight(model).copy_(torch.from_numpy(weights))
    if manifest.cache == INT8:
        scales = read_scales(root / REFERENCE_FILE)
        tap(
            model,
            rounding(
                {layer: (torch.from_numpy(key), torch.from_numpy(value)) for layer, (key, value) in scales.items()}
            ),
        )
    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    length = manifest.bounds.context_tokens
    return Reference(
        model=model,
        tokenizer=tokenizer,
        heldout=torch.from_numpy(stored["heldout"].astype(np.int64))[:, :length],
        source_nats=torch.from_numpy(stored["heldout_nats"])[:, : length - 1],
    )


def _weights(graph: ir.Graph, name: str, form: Form, rows: int, cols: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The (rows, cols) matrix of unit `name`, from the initializers that surgery named after it, in memory of its own.

    Their file is let go of: nothing of the bundle stays mapped here.
    """
    stored = {}
    for part in form.tensors(rows, cols):
        value = graph.initializers.get(f"{name}.{part}")
        if value is None or value.const_value is None:
            raise ArtifactError(f"the graph has no {name}.{part}: graph and manifest do not belong together")
        stored[part] = value.const_value
    weights = dequantize(form, {part: np.asarray(tensor.numpy()) for part, tensor in stored.items()}, rows, cols)
    for tensor in stored.values():
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
    return weights


@torch.no_grad()
def write_golden(reference: Reference, out: Path, *, context_tokens: int) -> None:
    """Fixed prompts and texts with what the reference makes of them: token ids, with special tokens and (plain)
    without, last logits (vocabulary,), greedy tokens, and at each the gap between the two best logits. And the tokens
    at which the model stops."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    steps = min(GREEDY_TOKENS, context_tokens // 4)
    for number, prompt in enumerate(PROMPTS):
        ids = reference.tokenizer(prompt)["input_ids"][: context_tokens - steps]
        first, greedy, gaps = _greedy(reference.model, ids, steps)
        tensors[f"prompt.{number}.ids"] = np.array(ids, np.int32)
        tensors[f"prompt.{number}.logits"] = first
        tensors[f"prompt.{number}.greedy"] = np.array(greedy, np.int32)
        tensors[f"prompt.{number}.gaps"] = np.array(gaps, np.float32)
    stops = getattr(reference.model.config, "eos_token_id", None)
    if stops is not None:
        tensors["stops"] = np.array(stops if isinstance(stops, list) else [stops], np.int32)
    for number, text in enumerate(TEXTS):
        ids = reference.tokenizer(text)["input_ids"]
        plain = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = reference.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        tensors[f"text.{number}.bytes"] = np.frombuffer(text.encode(), np.uint8)
        tensors[f"text.{number}.ids"] = np.array(ids, np.int32)
        tensors[f"text.{number}.plain"] = np.array(plain, np.int32)
        tensors[f"text.{number}.decoded"] = np.frombuffer(decoded.encode(), np.uint8)
    save_file(tensors, out)


def _greedy(
    model: torch.nn.Module, ids: Sequence[int], steps: int
) -> tuple[np.ndarray[Any, Any], list[int], list[float]]:
    sequence, greedy, gaps, first = list(ids), [], [], None
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].float()
        first = logits.numpy() if first is None else first
        best = torch.topk(logits, 2)
        greedy.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        sequence.append(greedy[-1])
    assert first is not None
    return first, greedy, gaps
