"""Quality along the map's curve: bundles of many sizes, written and run by ONNX Runtime, against llama.cpp's quants.

    python benchmarks/quality.py --model MODEL_FOLDER --map MAP --text TEXT [--sizes 85MB 91MB …] [--windows N]
        [--polish MINUTES --calibration TEXT …] [--no-baseline] [--json FILE]

The llama.cpp figures were measured once for SmolLM2-135M-Instruct off its 4-bit grid: importance matrix from similar
text, the same windows of WikiText-2's validation text, second half scored. For another model pass --no-baseline.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
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
from numpy.typing import NDArray

from packager.bundle.weights import overwrite_scales
from packager.planning.plan import plan_file_bytes
from packager.planning.size_curve import standard_error
from packager.profile import load_profile
from packager.progress import Silent
from packager.scoring.polish_plan import Polishing, polish_plan
from packager.sizes import parse_size

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
    reach = min((file_bytes for file_bytes, _ in LLAMA_CPP.values() if file_bytes >= size), default=None)
    if reach is None:
        return None
    rise, name = min((rise, name) for name, (file_bytes, rise) in LLAMA_CPP.items() if file_bytes <= reach)
    return name, rise


def main() -> None:
    parser = make_parser(__doc__, "model", "map", "text", windows=40, profile="edge-box-256mb", json=None)
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=["60MB", "70MB", "85MB", *(str(size) for size, _ in LLAMA_CPP.values() if size < 140_000_000)],
        help="most bytes of graph and weights (default: 60, 70 and 85 MB, and llama.cpp's files)",
    )
    parser.add_argument("--polish", type=float, metavar="MINUTES", help="measure each size polished, too")
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="text to polish on")
    parser.add_argument("--no-baseline", action="store_true", help="leave llama.cpp out")
    arguments = parser.parse_args()

    subject, profile = open_subject(arguments), load_profile(arguments.profile)
    loaded = subject.map
    rows, data = [], []
    for limit in sorted(parse_size(text) for text in arguments.sizes):
        plan = plan_file_bytes(loaded, profile, limit - _GRAPH_ALLOWANCE)
        rival = None if arguments.no_baseline else best_rival(limit)
        bits = 8 * plan.file_bytes / sum(unit.elements for unit in loaded.scoremap.units)
        with tempfile.TemporaryDirectory() as scratch:
            variants: list[tuple[str, dict[str, NDArray[np.float32]]]] = [("map", {})]
            if arguments.polish:
                polishing = Polishing(
                    checkpoint=subject.checkpoint, minutes=arguments.polish, calibration_paths=arguments.calibration
                )
                scales, _ = polish_plan(loaded, plan, polishing, Silent())
                variants.append((f"polished, {arguments.polish:g} min", scales))
            for name, scales in variants:
                graph = write_bundle(loaded, plan, profile, Path(scratch, name))
                if scales:
                    overwrite_scales(graph, scales)
                rise, size = half_window_losses(graph, subject.windows) - subject.original, graph_bytes(graph)
                mean, noise = float(rise.mean()), standard_error(rise)
                against = [f"{rival[0]} {rival[1]:.4f}", f"{mean / rival[1]:.2f}"] if rival else ["", ""]
                measured = (f"{mean:.4f} ± {noise:.4f}", f"{plan.loss_nats:.4f}")
                rows.append([f"{limit:,}", name, f"{size:,}", f"{bits:.2f}", *measured, *against])
                data.append(
                    {
                        "limit_bytes": limit,
                        "variant": name,
                        "bytes": size,
                        "rise_nats": mean,
                        "noise_nats": noise,
                        "predicted_nats": plan.loss_nats,
                        "rival": rival,
                    }
                )
                print(" | ".join(rows[-1]), flush=True)
    header = [
        "at most",
        "variant",
        "bytes",
        "bits/weight",
        "rise (nats/token)",
        "predicted",
        "llama.cpp's best",
        "× its rise",
    ]
    show(
        f"{about_windows(subject, arguments.text)}; llama.cpp's best: its least rise up to its next size", header, rows
    )
    write_figures(arguments.json, data)


if __name__ == "__main__":
    main()
