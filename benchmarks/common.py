"""What the benchmarks share: arguments, the model under test, losses of half windows, runs in fresh processes, tables.

No benchmark itself: the others import it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from packager.bundle.folder import BundleFolder
from packager.bundle.writer import Recipe, write_contents
from packager.forms.registry import Form
from packager.planning.plan import Plan
from packager.profile import DeviceProfile
from packager.runtime.sessions import graph_losses, token_losses
from packager.scoremap.folder import store_key
from packager.scoremap.model import Unit
from packager.scoremap.opening import OpenedMap, open_map
from packager.source.calibration_text import WINDOW, text_windows
from packager.source.checkpoint import Checkpoint, open_checkpoint

_SHARED: dict[str, tuple[Callable[[str], Any], str]] = {
    "model": (Path, "folder of the original model"),
    "map": (Path, "its score map, from 'packager score'"),
    "text": (Path, "text to measure on: .txt, .jsonl or .parquet"),
    "windows": (int, "windows of 512 tokens to measure on"),
    "threads": (int, "threads of the runtime"),
    "repeats": (int, "fresh processes of each kind"),
    "profile": (str, "device profile: a name or a TOML file"),
    "json": (Path, "write every figure to this file"),
}
_PROBE = Path(__file__).with_name("runtime_probe.py")
_PEAK, PREFILL, DECODE = PROBE_KEYS = ("peak_bytes", "prefill_tokens_per_second", "decode_tokens_per_second")
"""What `runtime_probe.py` prints."""


def make_parser(description: str | None, *required: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser of the shared options named: those in `required` must be given, those in `defaults` need not."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*required, *defaults):
        kind, about = _SHARED[name]
        default = defaults.get(name)
        note = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", type=kind, required=name in required, default=default, help=about + note)
    return parser


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model and its map, `windows` (n, 512) of token ids, and the source's loss on each window's second half."""

    checkpoint: Checkpoint
    map: OpenedMap
    windows: NDArray[np.int64]
    original: NDArray[np.float64]


def open_subject(arguments: argparse.Namespace) -> Subject:
    """The subject that --model, --map, --text and --windows name; the source model runs in float32."""
    checkpoint = open_checkpoint(str(arguments.model))
    windows = text_windows(arguments.text, checkpoint.tokenizer(), arguments.windows).numpy()
    return Subject(
        checkpoint=checkpoint,
        map=open_map(arguments.map),
        windows=windows,
        original=torch_losses(checkpoint.load(), windows),
    )


def about_windows(subject: Subject, text: Path) -> str:
    """What was measured on, for a table's title."""
    return (
        f"{len(subject.windows)} windows of {WINDOW} tokens of {text.name}, second half scored; "
        f"source {subject.original.mean():.4f}"
    )


def half_window_losses(graph: Path, windows: NDArray[np.int64], *, cache_width: int = 0) -> NDArray[np.float64]:
    """Mean loss in nats per token of each window's second half, on ONNX Runtime (llama.cpp's way of scoring)."""
    losses: NDArray[np.float64] = graph_losses(graph, windows, cache_width=cache_width)[:, WINDOW // 2 - 1 :].mean(
        axis=1, dtype=np.float64
    )
    return losses


def torch_losses(model: Any, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same in torch."""
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=torch.from_numpy(window)[None], use_cache=False).logits[0].float().numpy()
            losses.append(token_losses(logits, window)[WINDOW // 2 - 1 :].mean(dtype=np.float64))
    return np.array(losses)


def stored_weights(store: Any, unit: Unit, form: Form) -> torch.Tensor:
    """The matrix of `unit` in `form`, float32 (rows, cols), from a map's store opened by `safe_open(…, "numpy")`."""
    tensors = {
        name: store.get_tensor(store_key(unit.name, form.label, name)) for name in form.tensors(unit.rows, unit.cols)
    }
    return torch.from_numpy(form.dequantize(tensors, unit.rows, unit.cols))


def write_bundle(source: OpenedMap, plan: Plan, profile: DeviceProfile, root: Path) -> Path:
    """What a runtime needs of a plan's bundle, in the new folder `root`: the graph's path."""
    write_contents(Recipe(source=source, plan=plan, profile=profile), root)
    return BundleFolder(root=root).graph


def graph_bytes(graph: Path) -> int:
    """Bytes of a graph and its external data."""
    return sum(path.stat().st_size for path in graph.parent.iterdir() if path.name.startswith(graph.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRun:
    """One run of `runtime_probe.py`. `max_length` 0 leaves the context to the model, `chunk_size` 0 the chunks."""

    path: Path
    new: int
    threads: int
    runtime: str = "genai"
    python: str = sys.executable
    max_length: int = 0
    chunk_size: int = 0

    def start(self, ids: Path, environment: Mapping[str, str] | None = None) -> dict[str, float] | str:
        """A fresh process over the prompt's token ids in the JSON file `ids`: its figures, or how it failed."""
        numbers = (self.new, self.threads, self.max_length, self.chunk_size)
        # -P keeps this folder off sys.path, so that the child imports what a device's own script would.
        command = [self.python, "-P", str(_PROBE), self.runtime, str(self.path), str(ids), *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | (environment or {}))
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][-200:]
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return figures


def best(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The highest peak and the best speeds of several runs."""
    return {key: max(run[key] for run in runs) for key in PROBE_KEYS}


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def write_figures(path: Path | None, data: Any) -> None:
    """Every figure as JSON, where a file was named."""
    if path:
        path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
