"""What the benchmarks share: text to windows, losses on ONNX Runtime, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packager.runtime import full_logits_session, run_window, token_losses

WINDOW = 512


def text_windows(tokenizer: Any, path: Path, count: int) -> NDArray[np.int64]:
    """The first `count` windows of 512 tokens of a text file."""
    ids = tokenizer(path.read_text(encoding="utf-8")[: count * WINDOW * 16], add_special_tokens=False)["input_ids"]
    return np.array(ids[: len(ids) // WINDOW * WINDOW], np.int64).reshape(-1, WINDOW)[:count]


def graph_losses(graph: Path, windows: NDArray[np.int64], *, cache_width: int = 0) -> NDArray[np.float64]:
    """Mean loss in nats per token of each window's second half, on ONNX Runtime (llama.cpp's way of scoring)."""
    session = full_logits_session(graph)
    return np.array(
        [token_losses(run_window(session, window, cache_width=cache_width), window)[WINDOW // 2 - 1 :].mean(dtype=np.float64) for window in windows]
    )


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


def noise(rise: NDArray[np.float64]) -> float:
    """Standard error of the mean of paired differences, window by window."""
    return float(rise.std(ddof=1) / np.sqrt(len(rise))) if len(rise) > 1 else float("nan")


def show(title: str, header: list[str], rows: list[list[str]], out: Path | None, data: Any) -> None:
    """Print a table in Markdown, and write `data` as JSON where asked."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if out:
        out.write_text(json.dumps(data, indent=2) + "\n")
