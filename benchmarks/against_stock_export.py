"""Quality at equal bytes: our bundle against ONNX Runtime GenAI's own int4 export of the same model.

    python benchmarks/against_stock_export.py --model MODEL_FOLDER --map MAP --text TEXT [--windows N] [--json FILE]

ONNX Runtime runs both on the same windows of text; the source model runs in float32. Ours takes at most the bytes
(graph and weights) that the stock export takes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import (
    about_windows,
    graph_bytes,
    half_window_losses,
    make_parser,
    open_subject,
    show,
    write_bundle,
    write_figures,
)

from packager.planning.plan import plan_file_bytes
from packager.planning.size_curve import standard_error
from packager.profile import load_profile

_GRAPH_ALLOWANCE = 1 << 20


def stock_export(model: Path, out: Path) -> Path:
    """The exporter's own int4 model in `out`, with its defaults for CPU: the graph's path."""
    options = {"-i": model, "-o": out, "-p": "int4", "-e": "cpu", "-c": out / "cache"}
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"the exporter ended with status {done.returncode}: {done.stderr[-2000:]}")
    return out / "model.onnx"


def main() -> None:
    arguments = make_parser(
        __doc__, "model", "map", "text", windows=40, profile="edge-box-256mb", json=None
    ).parse_args()

    subject, profile = open_subject(arguments), load_profile(arguments.profile)
    rows, data = [["source, float32", "", f"{subject.original.mean():.4f}", "", "", ""]], []
    with tempfile.TemporaryDirectory() as scratch:
        stock = stock_export(arguments.model, Path(scratch, "stock"))
        plan = plan_file_bytes(subject.map, profile, graph_bytes(stock) - _GRAPH_ALLOWANCE)
        ours = write_bundle(subject.map, plan, profile, Path(scratch, "ours"))
        stock_rise = float("nan")
        for name, graph, predicted in (
            ("stock int4 export", stock, ""),
            ("packager", ours, f"{plan.loss_nats:.4f}"),
        ):
            losses = half_window_losses(graph, subject.windows, cache_width=subject.map.geometry.head_dim)
            rise = losses - subject.original
            mean, size = float(rise.mean()), graph_bytes(graph)
            stock_rise = mean if graph == stock else stock_rise
            measured = f"{mean:.4f} ± {standard_error(rise):.4f}"
            rows.append([name, f"{size:,}", f"{losses.mean():.4f}", measured, predicted, f"{mean / stock_rise:.2f}"])
            data.append({"name": name, "bytes": size, "loss_nats": float(losses.mean()), "rise_nats": mean})
    show(
        about_windows(subject, arguments.text),
        ["model", "bytes", "loss (nats/token)", "rise", "predicted", "× stock's rise"],
        rows,
    )
    write_figures(arguments.json, data)


if __name__ == "__main__":
    main()
