"""Quality at equal bytes: our bundle against ONNX Runtime GenAI's own int4 export of the same model.

    python benchmarks/against_stock_export.py --model MODEL_FOLDER --map MAP --text TEXT [--windows N] [--json FILE]

Both are run by ONNX Runtime on the same windows of text; the source model runs in float32. Ours takes at most the
bytes (graph and weights) that the stock export takes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from common import graph_bytes, half_window_losses, show, torch_losses

from packager.bundle.folder import GRAPH_FILE
from packager.bundle.writer import Recipe, write_contents
from packager.planning.plan import plan_file_bytes
from packager.planning.size_curve import standard_error
from packager.profile import load_profile
from packager.scoremap.opening import open_map
from packager.source.calibration_text import text_windows
from packager.source.checkpoint import open_checkpoint

_GRAPH_ALLOWANCE = 1 << 20


def stock_export(model: Path, out: Path) -> Path:
    """The exporter's own int4 model, with its defaults for CPU."""
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(model),
        "-o",
        str(out),
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        str(out / "cache"),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        subprocess.run(command, check=True, capture_output=True)
    return out / "model.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--map", type=Path, required=True, help="its score map, from 'packager score'")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint, loaded, profile = (
        open_checkpoint(str(arguments.model)),
        open_map(arguments.map),
        load_profile("edge-box-256mb"),
    )
    windows = text_windows(arguments.text, checkpoint.tokenizer(), arguments.windows).numpy()
    original = torch_losses(checkpoint.load(), windows)
    rows, data = [["source, float32", "", f"{original.mean():.4f}", "", "", ""]], []
    with tempfile.TemporaryDirectory() as scratch:
        stock = stock_export(arguments.model, Path(scratch, "stock"))
        limit = graph_bytes(stock)
        plan = plan_file_bytes(loaded, profile, limit - _GRAPH_ALLOWANCE)
        ours = Path(scratch, "ours")
        write_contents(Recipe(source=loaded, plan=plan, profile=profile), ours)
        stock_rise = None
        for name, graph in (("stock int4 export", stock), ("packager", ours / GRAPH_FILE)):
            losses = half_window_losses(graph, windows, cache_width=loaded.geometry.head_dim)
            rise = losses - original
            stock_rise = stock_rise if stock_rise is not None else rise.mean()
            predicted = f"{plan.loss_nats:.4f}" if name == "packager" else ""
            rows.append(
                [
                    name,
                    f"{graph_bytes(graph):,}",
                    f"{losses.mean():.4f}",
                    f"{rise.mean():.4f} ± {standard_error(rise):.4f}",
                    predicted,
                    f"{rise.mean() / stock_rise:.2f}",
                ]
            )
            data.append(
                {"name": name, "bytes": graph_bytes(graph), "loss_nats": losses.mean(), "rise_nats": rise.mean()}
            )
    show(
        f"{len(windows)} windows of 512 tokens of {arguments.text.name}, second half scored",
        ["model", "bytes", "loss (nats/token)", "rise", "predicted", "× stock's rise"],
        rows,
        arguments.json,
        data,
    )


if __name__ == "__main__":
    main()
