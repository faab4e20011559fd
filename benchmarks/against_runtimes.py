"""Peak memory and speed side by side: our bundles, ONNX Runtime GenAI's own int4 export, and llama.cpp.

    python benchmarks/against_runtimes.py --model MODEL_FOLDER --map MAP --text TEXT [--prompt 4000] [--new 32]
        [--threads 2] [--repeats 3] [--gguf FILE …] [--llama-python PYTHON] [--json FILE]

Ours take at most the bytes (graph and weights) of the stock export. The stock export runs in three ways: as it is, for
the model's whole context and with the logits of the whole prompt; with the context and the chunk size that our bundles
set; and with that context alone. The GGUF files are of about the same size, by default the demo package's own, where
the model is of its shape: neither memory nor speed depends on what the weights are. They run in PYTHON, an interpreter
that has llama-cpp-python; without one they are passed over. How llama.cpp was built decides its speed: name the build
beside its figures. Every run is a fresh process; the contestants take turns, and the best speed and the highest peak of
each count. Speeds mean nothing on a busy machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from against_stock_export import stock_export
from common import (
    DECODE,
    PREFILL,
    PROBE_KEYS,
    ProbeRun,
    best,
    graph_bytes,
    make_parser,
    show,
    write_bundle,
    write_figures,
)

from packager.errors import ModelError
from packager.planning.kv_cache_choice import offered
from packager.planning.plan import plan_file_bytes
from packager.profile import load_profile
from packager.scoremap.opening import open_map
from packager.sizes import format_size
from packager.source.checkpoint import DEMO, open_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A model of `bytes` for one runtime, and how it is run."""

    name: str
    bytes: int
    run: ProbeRun


def ours(arguments: argparse.Namespace, limit: int, length: int, scratch: Path) -> list[Contestant]:
    """Our bundle with each cache that the map offers, of at most `limit` bytes of graph and weights."""
    loaded = open_map(arguments.map)
    profile = dataclasses.replace(load_profile(arguments.profile), context_tokens=length)
    kinds, reason = offered(loaded.identity, profile.provider, "auto")
    if reason:
        print(f"no 8-bit cache: {reason}", flush=True)
    found = []
    for kind in kinds:
        folder = scratch / kind
        over, size = 0, limit + 1
        while size > limit:
            shutil.rmtree(folder, ignore_errors=True)
            plan = plan_file_bytes(loaded.with_cache(kind), profile, limit - over)
            size = graph_bytes(write_bundle(loaded, plan, profile, folder))
            over += max(0, size - limit)
        run = ProbeRun(path=folder, new=arguments.new, threads=arguments.threads)
        found.append(Contestant(name=f"packager, {kind} cache", bytes=size, run=run))
    return found


def llama_cpp(arguments: argparse.Namespace, length: int) -> list[Contestant]:
    """llama.cpp with each GGUF file, or a line that says why not."""
    python = arguments.llama_python
    done = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, encoding="utf-8")
    if done.returncode:
        print(
            f"llama.cpp skipped: {python} has no llama-cpp-python; pip install it into any environment and name its "
            "interpreter by --llama-python"
        )
        return []
    try:
        files = arguments.gguf or [open_checkpoint(DEMO).files[0]]
    except ModelError as error:
        print(f"llama.cpp skipped: no --gguf, and {error}")
        return []
    shared = {"new": arguments.new, "threads": arguments.threads, "max_length": length}
    return [
        Contestant(
            name=f"llama.cpp, {gguf.name}",
            bytes=gguf.stat().st_size,
            run=ProbeRun(path=gguf, runtime="llama", python=python, **shared),
        )
        for gguf in files
    ]


def stock(arguments: argparse.Namespace, length: int, scratch: Path) -> list[Contestant]:
    """The stock export as it is, with our context and chunk size, and with our context alone."""
    graph = stock_export(arguments.model, scratch / "stock")
    chunk = load_profile(arguments.profile).chunk_tokens
    plain = Contestant(
        name="stock int4 export as it is",
        bytes=graph_bytes(graph),
        run=ProbeRun(path=graph.parent, new=arguments.new, threads=arguments.threads),
    )
    bounded = dataclasses.replace(
        plain,
        name=f"stock int4 export, max_length {length}",
        run=dataclasses.replace(plain.run, max_length=length),
    )
    chunked = dataclasses.replace(
        bounded,
        name=f"{bounded.name}, chunk_size {chunk}",
        run=dataclasses.replace(bounded.run, chunk_size=chunk),
    )
    return [plain, chunked, bounded]


def main() -> None:
    parser = make_parser(__doc__, "model", "map", "text", profile="laptop-16gb", threads=2, repeats=3, json=None)
    parser.add_argument("--prompt", type=int, default=4000, help="tokens of the prompt (default: 4000)")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode (default: 32)")
    parser.add_argument("--gguf", type=Path, nargs="+", help="files for llama.cpp (default: the demo package's)")
    parser.add_argument("--llama-python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    arguments = parser.parse_args()

    prompt = arguments.prompt
    text = arguments.text.read_text(encoding="utf-8")[: prompt * 16]
    tokens = open_checkpoint(str(arguments.model)).tokenizer()(text, add_special_tokens=False)["input_ids"][:prompt]
    if len(tokens) < prompt:
        raise SystemExit(
            f"{arguments.text} has {len(tokens)} tokens, fewer than the prompt's {prompt}: name a longer text"
        )
    length = prompt + arguments.new
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (ids := scratch / "ids.json").write_text(json.dumps(tokens), encoding="utf-8")
        stocks = stock(arguments, length, scratch)
        contestants = [
            *stocks,
            *ours(arguments, stocks[0].bytes, length, scratch),
            *llama_cpp(arguments, length),
        ]
        runs: dict[str, list[dict[str, float]]] = {contestant.name: [] for contestant in contestants}
        for number in range(arguments.repeats):
            for contestant in contestants:
                figures = contestant.run.start(ids)
                if isinstance(figures, str):
                    raise SystemExit(f"{contestant.name} failed: {figures}")
                runs[contestant.name].append(figures)
                print(f"run {number + 1}: {contestant.name}: {figures}", flush=True)
    found = {contestant.name: best(runs[contestant.name]) for contestant in contestants}
    references = [found[contestant.name] for contestant in stocks[:2]]
    rows, ratios = [], []
    for contestant in contestants:
        figures = found[contestant.name]
        peak = int(figures["peak_bytes"])
        speeds = (f"{figures[key]:.1f}" for key in (PREFILL, DECODE))
        rows.append([contestant.name, f"{contestant.bytes:,}", f"{peak / 1e6:.0f}", f"{format_size(peak)}", *speeds])
        ratios.append(
            [contestant.name, *(f"{figures[key] / item[key]:.2f}" for item in references for key in PROBE_KEYS)]
        )
    show(
        f"prompt of {prompt} tokens, {arguments.new} decoded, {arguments.threads} threads, "
        f"{arguments.repeats} fresh processes each",
        ["model", "bytes", "peak, MB", "peak", "prefill, tokens/s", "decode, tokens/s"],
        rows,
    )
    show(
        f"as multiples of two of these: the stock export as it is (A), and with max_length {length} and chunks (B)",
        ["model", *(f"{phase} × {name}" for name in "AB" for phase in ("peak", "prefill", "decode"))],
        ratios,
    )
    write_figures(
        arguments.json,
        [{"name": item.name, "bytes": item.bytes} | found[item.name] for item in contestants],
    )


if __name__ == "__main__":
    main()
