"""Peak memory and speed side by side: our bundles, ONNX Runtime GenAI's own int4 export, and llama.cpp.

    python benchmarks/against_runtimes.py --model MODEL_FOLDER --map MAP --text TEXT [--prompt 4000] [--new 32]
        [--threads 2] [--repeats 3] [--gguf FILE …] [--llama-python PYTHON] [--json FILE]

Ours take at most the bytes (graph and weights) of the stock export. That runs in three ways: as it is, for the model's
whole context and with the logits of the whole prompt; with the context and the pieces of a prompt that our bundles set
as well; and with that context alone. The GGUF files are of about the same size, by default the demo package's own,
where the model is of its shape: neither memory nor speed depends on what the weights are. They run in PYTHON, an
interpreter that has llama-cpp-python, and are passed over where there is none. Every run is a fresh process; the
contestants take turns, the best speed and the highest peak of each count. Speeds mean nothing on a busy machine.
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
from typing import Any

from against_stock_export import stock_export
from common import graph_bytes, show

from packager.bundle.writer import GRAPH_FILE, write_contents
from packager.errors import ModelError
from packager.planning.kv_cache_choice import offered
from packager.planning.plan import load_map, plan_file_bytes
from packager.profile import load_profile
from packager.sizes import format_size
from packager.source.checkpoint import DEMO, open_checkpoint

_PROFILE = "laptop-16gb"
_PROBE = Path(__file__).with_name("runtime_probe.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """A model for one runtime; `max_length` 0 leaves the context to it, `chunk_size` 0 the pieces of a prompt."""

    name: str
    runtime: str
    python: str
    path: Path
    bytes: int
    max_length: int
    chunk_size: int = 0


def ours(arguments: argparse.Namespace, limit: int, length: int, scratch: Path) -> list[Contestant]:
    """Our bundle with each cache that the map offers, of at most `limit` bytes of graph and weights."""
    loaded = load_map(arguments.map)
    profile = dataclasses.replace(load_profile(_PROFILE), context_tokens=length)
    kinds, reason = offered(loaded.identity, profile.provider, "auto")
    if reason:
        print(f"no 8-bit cache: {reason}", flush=True)
    found = []
    for kind in kinds:
        folder = scratch / kind
        over, size = 0, limit + 1
        while size > limit:
            shutil.rmtree(folder, ignore_errors=True)
            write_contents(loaded, plan_file_bytes(loaded.with_cache(kind), profile, limit - over), profile, folder)
            size = graph_bytes(folder / GRAPH_FILE)
            over += max(0, size - limit)
        found.append(
            Contestant(
                name=f"packager, {kind} cache",
                runtime="genai",
                python=sys.executable,
                path=folder,
                bytes=size,
                max_length=0,
            )
        )
    return found


def llama_cpp(arguments: argparse.Namespace, length: int) -> list[Contestant]:
    """llama.cpp with each GGUF file, or a line that says why not."""
    done = subprocess.run([arguments.llama_python, "-c", "import llama_cpp"], capture_output=True, encoding="utf-8")
    if done.returncode:
        print(
            f"llama.cpp skipped: {arguments.llama_python} has no llama-cpp-python; pip install it into any "
            f"environment and name it by --llama-python"
        )
        return []
    try:
        files = arguments.gguf or [open_checkpoint(DEMO).files[0]]
    except ModelError as error:
        print(f"llama.cpp skipped: no --gguf, and {error}")
        return []
    return [
        Contestant(
            name=f"llama.cpp, {gguf.name}",
            runtime="llama",
            python=arguments.llama_python,
            path=gguf,
            bytes=gguf.stat().st_size,
            max_length=length,
        )
        for gguf in files
    ]


def run(contestant: Contestant, ids: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One fresh process."""
    # -P keeps this folder off sys.path, so that the child imports what a device's own script would.
    command = [
        contestant.python,
        "-P",
        str(_PROBE),
        contestant.runtime,
        str(contestant.path),
        str(ids),
        str(arguments.new),
        str(arguments.threads),
    ]
    child = subprocess.run(
        [*command, str(contestant.max_length), str(contestant.chunk_size)], capture_output=True, encoding="utf-8"
    )
    if child.returncode:
        raise SystemExit(f"{contestant.name} ended with status {child.returncode}: {child.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--map", type=Path, required=True, help="its score map, from 'packager score'")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=4000)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gguf", type=Path, nargs="+")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    text = arguments.text.read_text(encoding="utf-8")[: arguments.prompt * 16]
    tokens = open_checkpoint(str(arguments.model)).tokenizer()(text, add_special_tokens=False)["input_ids"][
        : arguments.prompt
    ]
    if len(tokens) < arguments.prompt:
        raise SystemExit(
            f"{arguments.text} has {len(tokens)} tokens, fewer than the prompt's {arguments.prompt}: name a longer text"
        )
    length = arguments.prompt + arguments.new
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (ids := scratch / "ids.json").write_text(json.dumps(tokens), encoding="utf-8")
        stock = stock_export(arguments.model, scratch / "stock")
        size = graph_bytes(stock)
        plain = Contestant(
            name="stock int4 export as it is",
            runtime="genai",
            python=sys.executable,
            path=stock.parent,
            bytes=size,
            max_length=0,
        )
        bounded = dataclasses.replace(plain, name=f"stock int4 export, max_length {length}", max_length=length)
        chunk = load_profile(_PROFILE).chunk_tokens
        chunked = dataclasses.replace(bounded, name=f"{bounded.name}, chunk_size {chunk}", chunk_size=chunk)
        contestants = [plain, chunked, bounded, *ours(arguments, size, length, scratch), *llama_cpp(arguments, length)]
        runs: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
        for number in range(arguments.repeats):
            for contestant in contestants:
                runs[contestant.name].append(figures := run(contestant, ids, arguments))
                print(f"run {number + 1}: {contestant.name}: {figures}", flush=True)
    data = []
    for contestant in contestants:
        figures = {key: max(item[key] for item in runs[contestant.name]) for key in runs[contestant.name][0]}
        data.append({"name": contestant.name, "bytes": contestant.bytes} | figures)
    keys = ("peak_bytes", "prefill_tokens_per_second", "decode_tokens_per_second")
    rows = []
    for item in data:
        peak = f"{item['peak_bytes'] / 1e6:.0f} ({format_size(item['peak_bytes'])})"
        ratios = [" / ".join(f"{item[key] / stock_[key]:.2f}" for key in keys) for stock_ in data[:2]]
        rows.append([item["name"], f"{item['bytes']:,}", peak, *(f"{item[key]:.1f}" for key in keys[1:]), *ratios])
    against = [f"× {name}: peak / prefill / decode" for name in ("stock as it is", "stock with our context and pieces")]
    header = ["model", "bytes", "peak, MB", "prefill, tokens/s", "decode, tokens/s", *against]
    title = (
        f"prompt of {arguments.prompt} tokens, {arguments.new} decoded, {arguments.threads} threads, "
        f"{arguments.repeats} fresh processes each"
    )
    show(title, header, rows, arguments.json, data)


if __name__ == "__main__":
    main()
