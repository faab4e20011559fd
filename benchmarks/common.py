"""What the benchmarks share: losses of the second halves of windows, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packager.runtime.sessions import graph_losses, token_losses
from packager.source.calibration_text import WINDOW


def half_window_losses(graph: Path, windows: NDArray[np.int64], *, cache_width: int = 0) -> NDArray[np.float64]:
    """Mean loss in nats per token of each window's second half, on ONNX Runtime (llama.cpp's way of scoring)."""
    return graph_losses(graph, windows, cache_width=cache_width)[:, WINDOW // 2 - 1 :].mean(axis=1, dtype=np.float64)


def torch_losses(model: Any, windows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same in torch, for the source model in float32."""
    import torch

    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=torch.from_numpy(window)[None], use_cache=False).logits[0].float().numpy()
            losses.append(token_losses(logits, window)[WINDOW // 2 - 1 :].mean(dtype=np.float64))
    return np.array(losses)


def graph_bytes(graph: Path) -> int:
    """Bytes of a graph and its external data."""
    return sum(path.stat().st_size for path in graph.parent.iterdir() if path.name.startswith(graph.name))


def show(title: str, header: list[str], rows: list[list[str]], out: Path | None, data: Any) -> None:
    """Print a table in Markdown, and write `data` as JSON where asked."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if out:
        out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
