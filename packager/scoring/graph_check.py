"""Before a score: does the exporter's graph compute what the model computes, and has the runtime kernels for it?

A score takes minutes to hours; a graph that is wrong, or that no kernel runs, is worth nothing afterwards. So a small
model of the same configuration (one layer of each kind, a narrow MLP, a small vocabulary, random weights) is exported,
filled with floats and run by ONNX Runtime GenAI, and its logits are held against torch's: after a short prompt, and
after prompts that pass every length at which the configuration changes how positions or windows count.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from packager.errors import UnsupportedModelError
from packager.forms.floats import FloatForm
from packager.graph.names import GENAI_FILE, GRAPH_FILE
from packager.graph.skeleton import export_skeleton
from packager.graph.surgery import GraphOptions, Placement, write_model
from packager.io.files import read_json, write_text
from packager.io.leftovers import scratch_folder
from packager.io.safetensors_ranges import read_header
from packager.profile import FLOAT
from packager.runtime.genai_config import GenaiBounds, bounded_config
from packager.runtime.graph_probe import LOGITS_FILE, PROMPTS_FILE
from packager.runtime.limits import run_limited
from packager.source.checkpoint import vectors
from packager.source.quiet import one_line
from packager.source.unit_weights import find_sources

LIMIT_ERROR = 2e-4
"""Largest difference of a logit, in standard deviations of the logits. Float kernels differ from torch by some 1e-6."""
PIECE_TOKENS = 64
_SHORT_TOKENS = 100
_BEYOND_TOKENS = 40
_MADE_FOR = "original_max_position_embeddings"
_LENGTHS = {_MADE_FOR: 256, "sliding_window": 48, "attention_chunk_size": 80}
"""What of a configuration says where positions or windows begin to count otherwise, and how long it is in the check."""
# A limit of OLMo's queries, keys and values that random weights would never reach, and one that they do.
_CLIP, _CLIP_LIMIT = "clip_qkv", 0.5
# A prime: the exporter takes every linear layer of as many outputs as there are tokens for the head.
_VOCABULARY = 509
_WIDTH = 512
_SEED = 0
_MODEL_FILE = "model.onnx"


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphCheck:
    """What the check found. `errors`: length in tokens that the prompt passes (0: none) → largest difference of a logit
    in standard deviations, with the prompt in one piece. `whole_prompt`: the length past which prefill in pieces is
    wrong, 0 where it never is.
    """

    errors: Mapping[int, float]
    whole_prompt: int = 0


def check_graph(config: PretrainedConfig) -> GraphCheck:
    """Compare the exporter's CPU graph of a small model like `config` with torch.

    Raises UnsupportedModelError where they differ by more than LIMIT_ERROR, or the runtime does not run the graph.
    """
    lengths = thresholds(config)
    dice = np.random.default_rng(_SEED)
    prompts = {0: dice.integers(2, _VOCABULARY, _SHORT_TOKENS + 1)}
    prompts |= {real: dice.integers(2, _VOCABULARY, short + _BEYOND_TOKENS + 1) for real, short in lengths.items()}
    try:
        small = reduced(config)
        model = random_model(small)
        expected = {length: _torch_logits(model, ids) for length, ids in prompts.items()}
    except Exception as error:  # settings that do not fit each other make transformers raise anything
        raise UnsupportedModelError(
            f"no small model like {_name(config)} can be made to check its graph with ({one_line(error)}), so this "
            "model cannot be packed"
        ) from error
    with scratch_folder() as folder:
        genai = _write(model, small, folder, max(map(len, prompts.values())) + 1)
        errors = {}
        for pieces in (0, PIECE_TOKENS):
            found = _run(folder, genai, {str(length): ids for length, ids in prompts.items()}, pieces, small)
            errors[pieces] = {
                length: max(_error(expected[length][part], found[f"{length}.{part}"]) for part in ("prefill", "decode"))
                for length in prompts
            }
    wrong = [length for length, error in errors[0].items() if not error <= LIMIT_ERROR]
    if wrong:
        where = f"past {wrong[0]} tokens" if wrong[0] else "in any prompt"
        raise UnsupportedModelError(
            f"the exporter's graph of {_name(config)} is wrong {where}{_features(config)}: its logits differ from the "
            f"model's by {errors[0][wrong[0]]:.2g} standard deviations, {LIMIT_ERROR} is allowed; a bundle would "
            "answer wrongly, so this model cannot be packed"
        )
    in_pieces = [length for length, error in errors[PIECE_TOKENS].items() if not error <= LIMIT_ERROR]
    return GraphCheck(errors=errors[0], whole_prompt=min(in_pieces, default=0))


def thresholds(config: PretrainedConfig) -> dict[int, int]:
    """The lengths in tokens at which `config` changes how positions or windows count (the length that a rotary
    embedding was made for, a sliding window, a chunk of attention), rising, each with what stands for it in the reduced
    model.
    """
    found = {
        config_length: short for name, short in _LENGTHS.items() for config_length in _values(config.to_dict(), name)
    }
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 0)
    return {length: found[length] for length in sorted(found) if length < longest}


def _values(plain: Mapping[str, Any], name: str) -> list[int]:
    """Whole numbers above 0 under `name`, also in the kinds of rotary embedding."""
    inner = [value for value in plain.values() if isinstance(value, dict)]
    found = [plain[name]] if isinstance(plain.get(name), int) and plain[name] > 0 else []
    return found + [value for each in inner for value in _values(each, name)]


def _shortened(plain: dict[str, Any], longest: int) -> dict[str, Any]:
    """`plain` with every length that the thresholds name in its short form, also in the kinds of rotary embedding; the
    ratio of the longest position to the one that the rotary embedding was made for stays."""
    short = {key: _shortened(value, longest) if isinstance(value, dict) else value for key, value in plain.items()}
    for name, length in _LENGTHS.items():
        if isinstance(plain.get(name), int) and 0 < plain[name] < longest:
            short[name] = length
    if plain.get(_CLIP):
        short[_CLIP] = _CLIP_LIMIT
    return short


def reduced(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with one layer of each kind (two at least), a small vocabulary, a narrow MLP, short
    windows; of a text model inside another, that is done to the text model.

    What a kernel depends on stays as it is: head sizes and counts, rotary embedding, the hidden size.
    """
    plain = config.to_dict()
    part = next((name for name in ("text_config", "decoder_config") if isinstance(plain.get(name), dict)), None)
    plain = plain | {part: _reduced(plain[part])} if part else _reduced(plain)
    return config.__class__.from_dict(plain)


def _reduced(plain: dict[str, Any]) -> dict[str, Any]:
    """`reduced` of a configuration as plain data."""
    layers = int(plain["num_hidden_layers"])
    listed = {name: value for name, value in plain.items() if isinstance(value, list) and len(value) == layers > 1}
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kinds.setdefault(json.dumps([value[layer] for value in listed.values()]), layer)
    chosen = sorted(kinds.values())
    # Exporters end a graph in their own way (rows of all tokens but the last are dropped), so the last layer's kind
    # must be the last here too.
    if kinds and kinds[json.dumps([value[-1] for value in listed.values()])] != chosen[-1]:
        chosen.append(layers - 1)
    chosen += [layer for layer in range(layers) if layer not in chosen][: max(0, 2 - len(chosen))]
    longest = int(plain.get("max_position_embeddings") or 0)
    made_for = max((length for length in _values(plain, _MADE_FOR) if length < longest), default=0)
    plain = _shortened(plain, longest)
    if made_for:
        plain["max_position_embeddings"] = _LENGTHS[_MADE_FOR] * -(-longest // made_for)
    plain |= {name: [value[layer] for layer in chosen] for name, value in listed.items()}
    if isinstance(of_layers := plain.get("per_layer_config"), dict):
        changes = {int(layer): change for layer, change in of_layers.items()}
        plain["per_layer_config"] = {at: changes[layer] for at, layer in enumerate(chosen) if layer in changes}
    plain["num_hidden_layers"] = len(chosen)
    plain["vocab_size"] = _VOCABULARY
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(plain.get(name), int):
            plain[name] = min(plain[name], _WIDTH)
    plain |= {name: 0 for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in plain}
    plain.pop("quantization_config", None)
    return plain


def random_model(config: PretrainedConfig) -> torch.nn.Module:
    """A float32 model of `config` whose activations and logits are of ordinary size, the same every time."""
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dice = torch.Generator().manual_seed(_SEED)
    tables = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}  # type: ignore[operator]
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=dice)
            if parameter.dim() > 1:
                # Unit rows make activations of order one; the tables' larger ones make logits that prefer some tokens.
                parameter.copy_(values * (2.0 if id(parameter) in tables else 1.0) / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * values)  # around what it starts from: ones, or zeros where 1 + w multiplies
    return model


@torch.no_grad()
def _torch_logits(model: torch.nn.Module, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Logits after all of `ids` but the last, and after all of them, each from one pass over the whole text."""
    found = {}
    for part, tokens in (("prefill", ids[:-1]), ("decode", ids)):
        logits = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits
        found[part] = logits[0, -1].float().numpy()
    return found


def _write(model: torch.nn.Module, config: PretrainedConfig, folder: Path, context_tokens: int) -> dict[str, Any]:
    """The model's graph with its floats in `folder`; returns the runtime's configuration for it."""
    config.architectures = [type(model).__name__]
    matrices, _ = export_skeleton(config, dict(vectors(model)), "cpu", folder / "skeleton")
    sources = find_sources(matrices, model)
    stored = folder / "weights.safetensors"
    save_file({source.unit.name: source.weight(model).contiguous() for source in sources}, stored)
    regions = read_header(stored)[0]
    placements = [
        Placement(
            name=source.unit.name,
            matrix=source.unit.matrix,
            start=source.unit.start,
            tied=source.unit.kind == "tied",
            rows=source.unit.rows,
            cols=source.unit.cols,
            form=FloatForm(label="f32"),
            regions={"weight": regions[source.unit.name].region},
        )
        for source in sources
    ]
    options = GraphOptions(context_tokens=context_tokens, accuracy_level=0)
    write_model(folder / "skeleton" / GRAPH_FILE, placements, options, folder / _MODEL_FILE)
    return read_json(folder / "skeleton" / GENAI_FILE)


def _run(
    folder: Path, genai: dict[str, Any], prompts: Mapping[str, NDArray[np.int64]], pieces: int, config: PretrainedConfig
) -> dict[str, NDArray[np.float32]]:
    """What the runtime makes of the prompts, in one piece or in `pieces` tokens each."""
    longest = max(map(len, prompts.values())) + 1
    bounds = GenaiBounds(
        graph_file=_MODEL_FILE, context_tokens=longest, chunk_tokens=pieces or longest, kv_cache=FLOAT, threads=0
    )
    write_text(folder / GENAI_FILE, json.dumps(bounded_config(genai, bounds)))
    arrays: dict[str, Any] = dict(prompts)
    np.savez(folder / PROMPTS_FILE, **arrays)
    command = [sys.executable, "-P", "-m", "packager.runtime.graph_probe", str(folder)]
    done = run_limited(command, None, timeout_seconds=600)
    if done.returncode:
        raise UnsupportedModelError(
            f"ONNX Runtime does not run the graph of {_name(config)}{_features(config)}: "
            f"{done.ending.rpartition('Status Message: ')[2]}; this model cannot be packed for this runtime"
        )
    with np.load(folder / LOGITS_FILE) as found:
        return {name: found[name] for name in found.files}


def _error(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """The largest difference, as a share of the expected values' standard deviation."""
    return float(np.abs(found[: len(expected)] - expected).max() / expected.std())


def _name(config: PretrainedConfig) -> str:
    return str((config.architectures or [config.model_type])[0])


def _features(config: PretrainedConfig) -> str:
    """What of the configuration is known to matter, for people."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds: Sequence[Any] = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    found = [f"rotary scaling {kind['rope_type']!r}" for kind in kinds if kind.get("rope_type", "default") != "default"]
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    head = getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else None)
    found += [f"heads of {head}"] if head else []
    partial = next((kind["partial_rotary_factor"] for kind in kinds if kind.get("partial_rotary_factor", 1) != 1), None)
    found += [f"partial rotary {partial}"] if partial is not None else []
    return f" (it has {', '.join(dict.fromkeys(found))})" if found else ""
