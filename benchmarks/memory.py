"""How well packager.memory predicts: random models, every kind of form, each measured in a fresh process.

    python benchmarks/memory.py [--quick] [--model FOLDER] [--json FILE]

Needs no download: shapes come from transformers configs, weights and tokenizers are made up. `--model` adds the
shape and the tokenizer of a checkpoint on disk. Takes about four minutes on two cores, and 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packager.graph.skeleton import Matrix
    from packager.memory import MemoryEstimate

CHUNK_TOKENS = 128
THREADS = 2
NEW_TOKENS = 32
FORMS = (("q2g64", "q8g128"), ("q4g32", "q4g32"), ("q4g64z", "q4g64z"), ("q4g128", "q8g64"), ("q8g32", "q8g32"), ("f32", "f32"))
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "vocab_size": 24_000, "tie_word_embeddings": True,
    },
    "wide": {
        "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 4, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 24_064, "tie_word_embeddings": False,
    },
    "many-words": {
        "model_type": "qwen3", "hidden_size": 768, "num_hidden_layers": 10, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 131_072, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One process to measure: linear units in `form`, embedding and head in `head`, a `cache` of floats or of int8 codes."""

    form: str
    head: str
    context_tokens: int
    prompt_tokens: int
    cache: str = "float"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model without weights: its exported graph, the matrices that it awaits, and a tokenizer."""

    name: str
    config: Any
    folder: Path
    matrices: tuple[Matrix, ...]
    nodes: int

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one unit."""
        return bool(self.config.tie_word_embeddings)


def cases(name: str, quick: bool) -> list[Case]:
    """Every form with a short and with a full prompt, then longer contexts in one form."""
    forms = FORMS[1::2] if quick else FORMS
    found = [Case(form=form, head=head, context_tokens=256, prompt_tokens=16) for form, head in forms]
    found += [Case(form=form, head=head, context_tokens=1024, prompt_tokens=1024 - NEW_TOKENS) for form, head in forms]
    codes = ((1024, 1024 - NEW_TOKENS),) if quick else ((2048, 2016), (8192, 64))
    found += [Case(form="q4g64", head="q4g64", context_tokens=tokens, prompt_tokens=prompt, cache="int8") for tokens, prompt in codes]
    if not quick:
        found += [Case(form="q4g64", head="q4g64", context_tokens=tokens, prompt_tokens=prompt) for tokens, prompt in ((512, 200), (2048, 2016), (4096, 16))]
        long = 8192 - NEW_TOKENS if name == "small" else 64
        found.append(Case(form="q4g64", head="q4g64", context_tokens=8192, prompt_tokens=long))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a handful of cases of the small shape")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint whose shape and tokenizer are measured too")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--measure", nargs=2, metavar=("BUNDLE", "PROMPT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(Path(options.measure[0]), int(options.measure[1]))
    from transformers import AutoConfig

    configs = {name: AutoConfig.for_model(**{"max_position_embeddings": 8192, **values}) for name, values in SHAPES.items()}
    if options.quick:
        configs = {"small": configs["small"]}
    if options.model:
        configs[options.model.name] = AutoConfig.from_pretrained(options.model)
    results = []
    print(f"{'shape':12}{'form':9}{'head':9}{'cache':6}{'context':>8}{'prompt':>8}{'measured':>10}{'anon':>8}{'file':>8}{'predicted':>11}{'error':>8}  peak")
    with tempfile.TemporaryDirectory() as scratch:
        for name, config in configs.items():
            tokenizer = options.model / "tokenizer.json" if options.model and name == options.model.name else None
            shape = export_shape(name, config, tokenizer, Path(scratch, name))
            for case in cases(name, options.quick):
                results.append(row := run_case(shape, case, Path(scratch, "bundle")))
                mib = {key: row[key] / 2**20 for key in ("measured", "anonymous", "mapped", "predicted")}
                print(
                    f"{name:12}{case.form:9}{case.head:9}{case.cache:6}{case.context_tokens:8}{case.prompt_tokens:8}{mib['measured']:10.1f}{mib['anonymous']:8.1f}"
                    f"{mib['mapped']:8.1f}{mib['predicted']:11.1f}{row['error']:+8.1%}  {row['peak_phase']}",
                    flush=True,
                )
    errors = [row["error"] for row in results]
    summary = {
        "cases": len(errors),
        "median_error": statistics.median(map(abs, errors)),
        "worst_error": max(map(abs, errors)),
        "most_under": min(0.0, *errors),
    }
    print(f"{len(errors)} cases: median {summary['median_error']:.1%}, worst {summary['worst_error']:.1%}, most under {summary['most_under']:.1%}")
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "cases": results}, indent=2, sort_keys=True) + "\n")
    return 0


def run_case(shape: Shape, case: Case, bundle: Path) -> dict[str, Any]:
    """Write the bundle, predict, measure in a fresh process, remove the bundle. Bytes throughout."""
    write_bundle(shape, case, bundle)
    predicted = predict(shape, case)
    # -P keeps this folder off sys.path, so that the child imports what a device's own script would.
    command = [sys.executable, "-P", __file__, "--measure", str(bundle), str(case.prompt_tokens)]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        raise SystemExit(f"{shape.name} {case}: {child.stderr[-2000:]}")
    figures = json.loads(child.stdout.splitlines()[-1])
    shutil.rmtree(bundle)
    return {
        "shape": shape.name,
        "form": case.form,
        "head": case.head,
        "cache": case.cache,
        "context_tokens": case.context_tokens,
        "prompt_tokens": case.prompt_tokens,
        "predicted": predicted.peak_bytes,
        "peak_phase": predicted.peak_phase,
        "error": predicted.peak_bytes / figures["measured"] - 1,
        "estimate": predicted.to_dict(),
        **figures,
    }


def measure(bundle: Path, prompt_tokens: int) -> int:
    """The device process: load, prefill, decode NEW_TOKENS. Prints one line of JSON, bytes."""
    import numpy as np
    import onnxruntime_genai as og

    started = time.perf_counter()
    model = og.Model(str(bundle))
    load_seconds = time.perf_counter() - started
    loaded = resident_now()
    tokenizer = og.Tokenizer(model)
    generator = og.Generator(model, og.GeneratorParams(model))
    vocab = json.loads((bundle / "genai_config.json").read_text())["model"]["vocab_size"]
    # Frequent tokens have low ids. This exponent touches as many pages of an embedding as English text and Python code do.
    weights = (np.arange(vocab) + 2.7) ** -1.15
    ids = np.random.default_rng(0).choice(vocab, prompt_tokens, p=weights / weights.sum()).astype(np.int32)
    del weights
    started = time.perf_counter()
    generator.append_tokens(ids)
    prefill_seconds = time.perf_counter() - started
    for _ in range(NEW_TOKENS):
        if generator.is_done():
            break
        generator.generate_next_token()
    tokenizer.decode(generator.get_sequence(0))
    final = resident_now()
    figures = {
        "measured": final["VmHWM"],
        "anonymous": final["RssAnon"],
        "mapped": final["RssFile"],
        "measured_load": loaded["VmHWM"],
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": prompt_tokens / prefill_seconds,
    }
    print(json.dumps(figures))
    return 0


def resident_now() -> dict[str, int]:
    """Bytes of this process by /proc's names."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in ("VmHWM:", "RssAnon:", "RssFile:")}


def predict(shape: Shape, case: Case) -> MemoryEstimate:
    """What packager.memory says, from shapes and counts alone."""
    from packager.forms import form_bytes
    from packager.memory import Geometry, estimate, looked_up_bytes, resident_bytes, tokenizer_entries
    from packager.profile import MemoryCoefficients

    coefficients, config = MemoryCoefficients(), shape.config
    geometry = Geometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        vocab=config.vocab_size,
        nodes=shape.nodes,
        tokenizer_bytes=(shape.folder / "tokenizer.json").stat().st_size,
        tokenizer_entries=tokenizer_entries(json.loads((shape.folder / "tokenizer.json").read_text())),
        cache_element_bytes=1 if case.cache == "int8" else 0,
    )
    used = min(case.context_tokens, case.prompt_tokens + NEW_TOKENS)
    weights = looked_up = largest = 0
    for _, matrix, form, role in units(shape, case):
        weights += resident_bytes(form, matrix.rows, matrix.cols, role=role, coefficients=coefficients, context_tokens=used)
        looked_up += looked_up_bytes(form, matrix.rows, matrix.cols, role=role, coefficients=coefficients, context_tokens=used)
        largest = max(largest, form_bytes(form, matrix.rows, matrix.cols) if role != "embedding" else 0)
    return estimate(
        geometry,
        weights_bytes=weights,
        looked_up_bytes=looked_up,
        largest_unit_bytes=largest,
        context_tokens=case.context_tokens,
        prompt_tokens=case.prompt_tokens,
        chunk_tokens=CHUNK_TOKENS,
        coefficients=coefficients,
    )


def units(shape: Shape, case: Case) -> list[tuple[int, Matrix, Any, Any]]:
    """(index, matrix, form, role) of every weight unit; a tied embedding and head are one."""
    from packager.forms import parse_form
    from packager.graph.layout import EMBEDDING, HEAD

    roles = {EMBEDDING: "embedding", HEAD: "tied" if shape.tied else "head"}
    kept = [matrix for matrix in shape.matrices if not (shape.tied and matrix.name == EMBEDDING)]
    return [(at, m, parse_form(case.head if m.name in roles else case.form), roles.get(m.name, "linear")) for at, m in enumerate(kept)]


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def export_shape(name: str, config: Any, tokenizer: Path | None, folder: Path) -> Shape:
    """The skeleton graph of `config` and a tokenizer of its vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM

    from packager.graph.skeleton import export_skeleton

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 0, 0
    vectors = {key: torch.ones(value.shape) for key, value in model.named_parameters() if value.dim() == 1}
    matrices, nodes = export_skeleton(config, vectors, "cpu", folder)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    else:
        make_tokenizer(config.vocab_size, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2TokenizerFast", "eos_token": "<|endoftext|>"}))
    return Shape(name=name, config=config, folder=folder, matrices=tuple(matrices), nodes=nodes)


def make_tokenizer(vocab_size: int, path: Path) -> None:
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


def write_bundle(shape: Shape, case: Case, out: Path) -> None:
    """A bundle of random weights, bounded to the case's context."""
    import numpy as np

    from packager.graph.skeleton import GENAI_FILE, GRAPH_FILE
    from packager.graph.surgery import GraphOptions, Placement, Region, write_model

    out.mkdir()
    found = units(shape, case)
    pools = {"uint8": out / "codes", "float32": out / "floats"}
    dice = np.random.default_rng(0)
    largest = {dtype: max([s.bytes for _, m, f, _ in found for s in f.tensors(m.rows, m.cols).values() if s.dtype == dtype], default=0) for dtype in pools}
    # Each unit starts elsewhere in the pool: the runtime keeps repacked weights of equal bytes only once.
    spare = len(found) * 4096
    pools["uint8"].write_bytes(dice.bytes(largest["uint8"] + spare))
    block = (dice.random(1 << 20, dtype=np.float32) * 0.01).tobytes()
    with pools["float32"].open("wb") as file:
        while file.tell() < largest["float32"] + spare:
            file.write(block)
    placements = []
    for at, matrix, form, role in found:
        specs = form.tensors(matrix.rows, matrix.cols)
        regions = {name: Region(path=pools[spec.dtype], offset=at * 4096, length=spec.bytes) for name, spec in specs.items()}
        placements.append(
            Placement(name=matrix.name, matrix=matrix.name, start=0, tied=role == "tied", rows=matrix.rows, cols=matrix.cols, form=form, regions=regions)
        )
    step = np.full((shape.config.num_key_value_heads, head_dim(shape.config)), 0.05, np.float32)
    scales = dict.fromkeys(range(shape.config.num_hidden_layers), (step, step)) if case.cache == "int8" else None
    bounds = GraphOptions(context_tokens=case.context_tokens, accuracy_level=4, cache_scales=scales)
    write_model(shape.folder / GRAPH_FILE, placements, bounds, out / "model.onnx")
    for pool in pools.values():
        pool.unlink()
    genai = json.loads((shape.folder / GENAI_FILE).read_text())
    genai["model"]["decoder"]["filename"] = "model.onnx"
    genai["model"]["decoder"]["session_options"]["intra_op_num_threads"] = THREADS
    genai["model"]["context_length"] = case.context_tokens
    # min_length: random weights may say stop at once.
    genai["search"] |= {"max_length": case.context_tokens, "min_length": case.context_tokens, "chunk_size": CHUNK_TOKENS}
    (out / GENAI_FILE).write_text(json.dumps(genai))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shape.folder / name, out)


if __name__ == "__main__":
    raise SystemExit(main())
