"""Quality along the map's curve: bundles of many sizes, written and run by ONNX Runtime, against llama.cpp's quants.

    python benchmarks/quality.py --model MODEL_FOLDER --map MAP --text TEXT [--sizes 85MB 91MB …] [--windows N]
        [--polish MINUTES --calibration TEXT …] [--json FILE]

The llama.cpp rows are those published with this project for SmolLM2-135M-Instruct off its 4-bit grid (importance matrix
from similar text, the same text and windows, second half scored); for another model pass --no-baseline.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import graph_bytes, half_window_losses, show, torch_losses
from numpy.typing import NDArray

from packager.bundle.folder import GRAPH_FILE
from packager.bundle.weights import overwrite_scales
from packager.bundle.writer import Recipe, write_contents
from packager.planning.plan import plan_file_bytes
from packager.planning.size_curve import standard_error
from packager.profile import load_profile
from packager.progress import Silent
from packager.scoremap.opening import open_map
from packager.scoring.polish_plan import Polishing, polish_plan
from packager.sizes import parse_size
from packager.source.calibration_text import text_windows
from packager.source.checkpoint import open_checkpoint

# llama.cpp file → (bytes, rise of the loss in nats per token over its float16 file).
LLAMA_CPP = {
    "IQ2_M": (85_589_088, 0.4080),
    "Q2_K": (88_201_824, 0.2510),
    "IQ4_XS": (90_897_504, 0.1037),
    "Q3_K_M": (93_510_240, 0.1422),
    "Q4_K_S": (102_039_648, 0.0504),
    "Q4_K_M": (105_454_176, 0.0343),
    "Q5_K_M": (112_103_520, 0.0209),
    "Q6_K": (138_382_944, 0.0103),
    "Q8_0": (144_811_104, 0.0094),
}
_GRAPH_ALLOWANCE = 700_000


def best_rival(size: int) -> tuple[str, float] | None:
    """The llama.cpp file of least rise among those no larger than the next size up from `size`."""
    larger = sorted((file_bytes, rise, name) for name, (file_bytes, rise) in LLAMA_CPP.items() if file_bytes >= size)
    if not larger:
        return None
    reach = larger[0][0]
    name, rise = min(
        ((name, rise) for name, (file_bytes, rise) in LLAMA_CPP.items() if file_bytes <= reach),
        key=lambda item: item[1],
    )
    return name, rise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--map", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["60MB", "70MB", "85MB", *(str(size) for size, _ in LLAMA_CPP.values() if size < 140_000_000)],
    )
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument(
        "--polish", type=float, metavar="MINUTES", help="measure each size polished, too (build --polish)"
    )
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="text to polish on")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint, loaded, profile = (
        open_checkpoint(str(arguments.model)),
        open_map(arguments.map),
        load_profile("edge-box-256mb"),
    )
    windows = text_windows(arguments.text, checkpoint.tokenizer(), arguments.windows).numpy()
    original = torch_losses(checkpoint.load(), windows)
    rows, data = [], []
    for limit in sorted(parse_size(text) for text in arguments.sizes):
        plan = plan_file_bytes(loaded, profile, limit - _GRAPH_ALLOWANCE)
        rival = None if arguments.no_baseline else best_rival(limit)
        bits = 8 * plan.file_bytes / sum(unit.elements for unit in loaded.scoremap.units)
        with tempfile.TemporaryDirectory() as scratch:
            variants: list[tuple[str, dict[str, NDArray[np.float32]]]] = [("map", {})]
            if arguments.polish:
                polishing = Polishing(
                    checkpoint=checkpoint, minutes=arguments.polish, calibration_paths=arguments.calibration
                )
                scales, _ = polish_plan(loaded, plan, polishing, Silent())
                variants.append((f"polished, {arguments.polish:g} min", scales))
            for name, scales in variants:
                folder = Path(scratch, name)
                write_contents(Recipe(source=loaded, plan=plan, profile=profile), folder)
                overwrite_scales(folder / GRAPH_FILE, scales)
                rise, size = (
                    half_window_losses(folder / GRAPH_FILE, windows) - original,
                    graph_bytes(folder / GRAPH_FILE),
                )
                against = [f"{rival[0]} {rival[1]:.4f}", f"{rise.mean() / rival[1]:.2f}"] if rival else ["", ""]
                rows.append(
                    [
                        f"{limit:,}",
                        name,
                        f"{size:,}",
                        f"{bits:.2f}",
                        f"{rise.mean():.4f} ± {standard_error(rise):.4f}",
                        f"{plan.loss_nats:.4f}",
                        *against,
                    ]
                )
                data.append(
                    {
                        "limit_bytes": limit,
                        "variant": name,
                        "bytes": size,
                        "rise_nats": rise.mean(),
                        "noise_nats": standard_error(rise),
                        "predicted_nats": plan.loss_nats,
                        "rival": rival,
                    }
                )
                print(" | ".join(rows[-1]), flush=True)
    header = [
        "at most",
        "",
        "bytes",
        "bits/weight",
        "rise measured (nats/token)",
        "predicted",
        "llama.cpp's best to the next size",
        "× its rise",
    ]
    show(
        f"{len(windows)} windows of 512 tokens of {arguments.text.name}, second half scored; source "
        f"{original.mean():.4f}",
        header,
        rows,
        arguments.json,
        data,
    )


if __name__ == "__main__":
    main()
