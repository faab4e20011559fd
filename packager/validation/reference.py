"""The torch model that computes with a bundle's very weights, dequantised: what the runtime is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from packager.bundle.golden import GoldenPrompt, GoldenText, write_golden_file
from packager.bundle.manifest import BundleUnit
from packager.bundle.opening import OpenedBundle
from packager.bundle.weights import unit_tensors
from packager.graph.skeleton import side_parameters
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
    """A torch model with a bundle's weights, whose cache rounds as the bundle's does, and its tokenizer."""

    model: torch.nn.Module
    tokenizer: Any

    @torch.no_grad()
    def exact_logits(self, window: torch.Tensor) -> torch.Tensor:
        """Logits (length, vocabulary) of a (length,) window where nothing that is cached is rounded."""
        nothing = {cache_keyword(self.model): DynamicCache(config=self.model.config)}
        logits: torch.Tensor = self.model(input_ids=window[None], **nothing).logits[0].float()
        return logits


def load_reference(bundle: OpenedBundle) -> Reference:
    """Rebuild a bundle in torch: architecture from its configuration, vectors from its reference file, every matrix
    dequantised from the bytes of the graph's weights."""
    root, manifest, stored = bundle.folder.root, bundle.manifest, bundle.folder.reference
    vectors = stored.vectors()
    config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    sources = find_sources(matrices_of((unit.matrix, unit.rows, unit.cols) for unit in manifest.units), model)
    graph = ir.load(bundle.folder.graph).graph
    with torch.no_grad():
        for name, parameter in side_parameters(model):
            parameter.copy_(torch.from_numpy(vectors[name]))
        for source, unit in zip(sources, manifest.units, strict=True):
            source.weight(model).copy_(torch.from_numpy(_weights(graph, unit)))
    if manifest.cache == INT8:
        scales = stored.kv_scales()
        tap(
            model,
            rounding(
                {layer: (torch.from_numpy(key), torch.from_numpy(value)) for layer, (key, value) in scales.items()}
            ),
        )
    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=False, local_files_only=True)
    return Reference(model=model, tokenizer=tokenizer)


def _weights(graph: ir.Graph, unit: BundleUnit) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The (rows, cols) matrix of a unit, in memory of its own. Its file is let go of: nothing of the bundle stays
    mapped here."""
    stored = unit_tensors(graph, unit)
    # No name may hold on to what lies in the file: it could not be let go of.
    weights = unit.parsed().dequantize(
        {part: np.asarray(tensor.numpy()) for part, tensor in stored.items()}, unit.rows, unit.cols
    )
    for tensor in stored.values():
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
    return weights


@torch.no_grad()
def write_golden(reference: Reference, out: Path, *, context_tokens: int) -> None:
    """Fixed prompts and texts with what the reference makes of them: token ids, with special tokens and (plain)
    without, last logits (vocabulary,), greedy tokens, and at each the gap between the two best logits. And the tokens
    at which the model stops."""
    steps = min(GREEDY_TOKENS, context_tokens // 4)
    prompts, texts = [], []
    for prompt in PROMPTS:
        ids = reference.tokenizer(prompt)["input_ids"][: context_tokens - steps]
        prompts.append(_greedy(reference.model, ids, steps))
    for text in TEXTS:
        ids = reference.tokenizer(text)["input_ids"]
        plain = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = reference.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(GoldenText(text=text, ids=ids, plain=plain, decoded=decoded))
    stops = getattr(reference.model.config, "eos_token_id", None)
    write_golden_file(out, prompts, texts, stops if isinstance(stops, list) else [] if stops is None else [stops])


def _greedy(model: torch.nn.Module, ids: Sequence[int], steps: int) -> GoldenPrompt:
    sequence, greedy, gaps, first = list(ids), [], [], None
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1].float()
        first = logits.numpy() if first is None else first
        best = torch.topk(logits, 2)
        greedy.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        sequence.append(greedy[-1])
    assert first is not None
    return GoldenPrompt(ids=ids, logits=first, greedy=greedy, gaps=gaps)
