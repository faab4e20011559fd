"""The torch model that computes with a bundle's very weights, dequantised: what the runtime is held against."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from packager.bundle.golden import GoldenContext, GoldenContexts, GoldenPrompt, GoldenText, write_golden_file
from packager.bundle.manifest import BundleUnit
from packager.bundle.opening import OpenedBundle
from packager.bundle.weights import unit_tensors
from packager.graph.skeleton import side_parameters
from packager.profile import INT8
from packager.source.kv_cache_rounding import cache_keyword, rounding, tap
from packager.source.unit_weights import find_sources, matrices_of
from packager.validation.context_lengths import context_lengths

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

    @torch.no_grad()
    def last_logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (vocabulary,) after the last of `ids`, from one pass; those of the others are not made, where the
        model can leave them out: a long prompt's take far more memory than all else."""
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False, **last).logits[0, -1].float()
        found: NDArray[np.float32] = logits.numpy().copy()
        return found


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
def write_golden(reference: Reference, bundle: OpenedBundle, out: Path) -> None:
    """Fixed prompts and texts with what the reference makes of them: token ids, with special tokens and (plain)
    without, last logits (vocabulary,), greedy tokens, and at each the gap between the two best logits. The tokens at
    which the model stops. And long prompts of held-out text, see `golden_contexts`."""
    context_tokens = bundle.manifest.bounds.context_tokens
    steps = min(GREEDY_TOKENS, context_tokens // 4)
    prompts, texts = [], []
    for prompt in PROMPTS:
        ids = reference.tokenizer(prompt)["input_ids"][: context_tokens - steps]
        prompts.append(_greedy(reference, ids, steps))
    for text in TEXTS:
        ids = reference.tokenizer(text)["input_ids"]
        plain = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = reference.tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(GoldenText(text=text, ids=ids, plain=plain, decoded=decoded))
    ends = getattr(reference.model.config, "eos_token_id", None)
    stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
    write_golden_file(out, prompts, texts, stops, golden_contexts(reference, bundle))


def golden_contexts(reference: Reference, bundle: OpenedBundle) -> GoldenContexts:
    """Prompts that fill the bundle's context and that pass each length at which its configuration counts otherwise, of
    the held-out windows' tokens in a row, with the reference's last logits."""
    bounds, text = bundle.manifest.bounds, bundle.folder.reference.held_out().windows.reshape(-1)
    lengths = context_lengths(reference.model.config, bounds.prompt_tokens, bounds.context_tokens)
    prompts = []
    for past, tokens in lengths.prompts.items():
        ids = np.resize(text, tokens).tolist()
        prompts.append(GoldenContext(ids=ids, logits=reference.last_logits(ids), past=past))
    return GoldenContexts(prompts=prompts, left_out=lengths.left_out)


def _greedy(reference: Reference, ids: Sequence[int], steps: int) -> GoldenPrompt:
    sequence, greedy, gaps, first = list(ids), [], [], None
    for _ in range(steps):
        logits = reference.last_logits(sequence)
        first = logits if first is None else first
        best = torch.topk(torch.from_numpy(logits), 2)
        greedy.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        sequence.append(greedy[-1])
    assert first is not None
    return GoldenPrompt(ids=ids, logits=first, greedy=greedy, gaps=gaps)
