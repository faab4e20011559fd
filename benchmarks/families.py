"""Which families of language models can be packed: the table of docs/families.md.

    python benchmarks/families.py > table.md
    python benchmarks/families.py --only lfm2,nemotron --pack

A small model with random weights is made of every architecture that transformers calls a causal language model, and
goes through what a score begins with: what it is, whether its weights are such as can be packed, whether the exporter's
graph computes what torch computes. "works" gives the largest difference of a logit, in standard deviations of the
logits; what is refused says with which words. With `--pack` what works is also scored quickly, built and validated.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import make_parser
from small_tokenizers import KINDS
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import packager
from packager.errors import PackagerError
from packager.source.checkpoint import on_meta
from packager.source.identify import identify, refuse_unless_language_model

_LAYERS, _VOCABULARY = 4, 512
# What is small in a model that stands for a real one. Heads stay wide enough for kernels that turn a quarter of them.
_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 1024,
    "sliding_window": 48,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 96,
    "block_multiple_of": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "n_embd": 256,
    "n_head": 4,
    "n_layer": _LAYERS,
    "n_inner": 96,
    "n_positions": 1024,
    "d_model": 256,
    "ffn_dim": 96,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# What makes a small model of a published kind where the class's own defaults are of none.
_AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "layer_types": ["full_attention"] * _LAYERS,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
}


def pico(model_type: str, architecture: str) -> PretrainedConfig:
    """A small configuration: what `_SMALL` says of the settings that the type has, but no window where it has none."""
    base = AutoConfig.for_model(model_type)
    known = base.to_dict()
    settings = {name: value for name, value in _SMALL.items() if name in known or hasattr(base, name)}
    if getattr(base, "sliding_window", None) is None:
        settings.pop("sliding_window", None)
    config: PretrainedConfig = AutoConfig.for_model(model_type, **settings | _AS_PUBLISHED.get(model_type, {}))
    config.architectures = [architecture]
    return config


def judged(model_type: str, architecture: str) -> tuple[str, float | None]:
    """The words of a refusal, or "" and the largest error."""
    from packager.scoring.graph_check import check_graph

    plain = {"model_type": model_type, "architectures": [architecture]}
    try:
        refuse_unless_language_model("MODEL", identify(plain))
        config = pico(model_type, architecture)
        refuse_unless_language_model("MODEL", identify(config.to_dict()))
        on_meta("MODEL", config)
        return "", max(check_graph(config).errors.values())
    except PackagerError as error:
        return str(error), None


def packed(model_type: str, architecture: str) -> str:
    """What becomes of a small model that is scored, built and validated."""
    config = pico(model_type, architecture)
    config.eos_token_id = 2
    tokenizer = KINDS["gpt2"].make()
    config.vocab_size = max(len(tokenizer), _VOCABULARY)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        text = folder / "text.txt"
        pages = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("common.py", "families.py"))
        text.write_text("\n".join(pages), encoding="utf-8")
        try:
            packager.score(folder / "model", out=folder / "it.map", calibration=[text], tokens=2048, quick=True)
            packager.build(
                folder / "it.map",
                profile="laptop-16gb",
                budget="300MiB",
                context=256,
                out=folder / "it.bundle",
                validate=False,
            )
            return "a valid bundle" if packager.validate(folder / "it.bundle").passed else "NOT VALID"
        except PackagerError as error:
            return f"FAILED: {error}"


def rows(only: set[str], pack: bool) -> Iterator[tuple[str, str, str]]:
    """Type, architecture, and what is said of it."""
    for model_type, classes in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        architecture = classes if isinstance(classes, str) else classes[0]
        if only and model_type not in only:
            continue
        words, error = judged(model_type, architecture)
        if error is None:
            yield model_type, architecture, words
        else:
            yield (
                model_type,
                architecture,
                f"works ({error:.1e})" + (f", {packed(model_type, architecture)}" if pack else ""),
            )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="model types, with commas between (default: all)")
    parser.add_argument("--pack", action="store_true", help="also score, build and validate what works (minutes)")
    arguments: argparse.Namespace = parser.parse_args()
    works: list[tuple[str, str, str]] = []
    refused: dict[str, list[str]] = {}
    for model_type, architecture, verdict in rows(set(filter(None, arguments.only.split(","))), arguments.pack):
        print(model_type, verdict[:160], file=sys.stderr, flush=True)
        if verdict.startswith("works"):
            works.append((model_type, architecture, verdict))
        else:
            # One row for all that are told the same.
            said = re.sub(r"expected one of .*", "expected one of …", verdict.replace(architecture, "NAME"))
            refused.setdefault(said, []).append(model_type)
    print("| model type | class | verdict |\n|---|---|---|")
    for model_type, architecture, verdict in works:
        print(f"| {model_type} | {architecture} | {verdict} |")
    print("\nRefused, with these words:\n")
    for said, types in sorted(refused.items(), key=lambda row: -len(row[1])):
        print(textwrap.fill(f"- {said}: {', '.join(types)}", 118, subsequent_indent="  ", break_on_hyphens=False))
    print(f"\n{len(works)} types work, {sum(len(types) for types in refused.values())} are refused.")


if __name__ == "__main__":
    main()
