"""One map, many budgets: what was predicted and what was measured, each bundle built and validated as 'packager build' does.

    python benchmarks/budgets.py --map MAP [--profile laptop-16gb] [--context 512] [--budgets 180MiB 200MiB …] [--json FILE]

Without --budgets, eight are spread evenly between the map's minimum and what the float16 model's size would need.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import show

from packager.bars import Bars
from packager.errors import InfeasibleBudgetError
from packager.pipeline import build
from packager.plan import LoadedMap, Request, load_map
from packager.profile import load_profile
from packager.sizes import format_size, parse_size


def spread(request: Request, loaded: LoadedMap, count: int) -> list[int]:
    """Budgets from the least that fits to the one at which weights reach the float16 model's bytes."""
    try:
        Request(profile=request.profile, budget_bytes=1 << 20, context_tokens=request.context_tokens).plan(loaded)
        raise SystemExit("a budget of 1 MiB was found feasible")
    except InfeasibleBudgetError as error:
        least = error.minimum_bytes
    low, high = least, request.profile.memory_bytes
    while high - low > 1 << 20:
        middle = (low + high) // 2
        plan = Request(profile=request.profile, budget_bytes=middle, context_tokens=request.context_tokens).plan(loaded)
        low, high = (middle, high) if plan.ratio < 1 else (low, middle)
    return [least + (2 << 20) + (low - least) * step // (count - 1) for step in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", type=Path, required=True)
    parser.add_argument("--profile", default="laptop-16gb")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--budgets", nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    loaded, profile = load_map(arguments.map), load_profile(arguments.profile)
    request = Request(profile=profile, context_tokens=arguments.context)
    budgets = [parse_size(text) for text in arguments.budgets] if arguments.budgets else spread(request, loaded, 8)
    rows, data = [], []
    for budget in budgets:
        wanted = Request(profile=profile, budget_bytes=budget, context_tokens=arguments.context)
        with tempfile.TemporaryDirectory() as scratch, Bars() as bars:
            built = build(loaded, wanted, Path(scratch, "bundle"), validate=True, force=False, progress=bars)
        report = built.report
        assert report is not None
        peak, rise = int(report.measured.get("peak_bytes", 0)), float(report.measured["loss_nats"])
        failed = [check.name for check in report.checks if check.passed is False]
        rows.append(
            [
                format_size(budget),
                f"{built.plan.file_bytes:,}",
                f"{built.plan.ratio:.1%}",
                format_size(report.rounds[0]["predicted_bytes"]),
                format_size(report.rounds[0]["measured_bytes"]),
                format_size(peak),
                f"{peak / budget:.1%}",
                str(len(report.rounds)),
                f"{built.plan.loss_nats:.4f}",
                f"{rise:.4f}",
                "valid" if report.passed else "FAILED: " + "; ".join(failed),
            ]
        )
        data.append(
            {"budget_bytes": budget, "plan": built.plan.to_dict() | {"choices": None}, "measured": report.measured, "rounds": report.rounds, "failed": failed}
        )
        print(" | ".join(rows[-1]), flush=True)
    header = [
        "budget",
        "weights, bytes",
        "ratio",
        "predicted peak, round 1",
        "measured, round 1",
        "final peak",
        "of budget",
        "rounds",
        "predicted rise",
        "held-out rise",
        "verdict",
    ]
    show(
        f"{arguments.map.name} on {profile.name}, context {arguments.context}; limit enforced by {report.enforced_by or 'nothing'}",
        header,
        rows,
        arguments.json,
        data,
    )


if __name__ == "__main__":
    main()
