"""One map, many budgets: what was predicted and what was measured, each bundle built and validated by `packager build`.

    python benchmarks/budgets.py --map MAP [--profile laptop-16gb] [--context 512] [--count 24 |
                                 --budgets 180MiB 200MiB …] [--repeats 3] [--most 9] [--json FILE]

Budgets are spread evenly between the map's minimum and what the float16 model's size would need, and every model takes
all that its budget allows. Every bundle is then run `--repeats` times under its limit and as often without one, in
turns: the system can drop mapped weights and read them again, so a run that survives its limit may still crawl. What
counts is the median ratio over all pairs of runs. Where it is below 0.9 after `--repeats` pairs, `--most` pairs are
run; a ratio that stays below 0.9 fails. A failed check, a limit that nothing enforces, and a binding budget used to
less than 93 % fail too. The exit status is 1 where any budget fails.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common import make_parser, show, write_figures

from packager.cli.progress_bars import Bars
from packager.errors import InfeasibleBudgetError
from packager.io.records import without_none
from packager.pipeline import build
from packager.planning.plan import Request
from packager.planning.target import Target
from packager.profile import load_profile
from packager.scoremap.opening import OpenedMap, open_map
from packager.sizes import format_size, parse_size
from packager.validation.acceptance import run_acceptance

LEAST_SHARE = 0.9
LEAST_USE = 0.93
PHASES = ("prefill", "decode")
MEMORY_HEADER = [
    "budget",
    "weights, bytes",
    "ratio",
    "predicted",
    "measured",
    "final",
    "used",
    "rounds",
    "predicted rise",
    "held-out rise",
]
SPEED_HEADER = ["budget", *(f"{phase}, tokens/s: limit / free (pairs)" for phase in PHASES), "verdict"]


def spread(request: Request, loaded: OpenedMap, count: int) -> list[int]:
    """Budgets from the least that fits to the one at which weights reach the float16 model's bytes."""
    try:
        replace(request, budget_bytes=1 << 20).plan(loaded)
        raise SystemExit("a budget of 1 MiB was found feasible")
    except InfeasibleBudgetError as error:
        least = error.minimum_bytes
    low, high = least, request.profile.memory_bytes
    while high - low > 1 << 20:
        middle = (low + high) // 2
        plan = replace(request, budget_bytes=middle).plan(loaded)
        low, high = (middle, high) if plan.ratio < 1 else (low, middle)
    return [least + (2 << 20) + (low - least) * step // max(1, count - 1) for step in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Medians in tokens per second under the limit and without, and the median of the ratios of `pairs` of runs side by
    side."""

    limited: float
    free: float
    share: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.limited:.1f} / {self.free:.1f} = {self.share:.2f} × ({self.pairs})"


def compared(found: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Speed]:
    """Speed of each phase over pairs of runs (under the limit, without)."""
    result = {}
    for phase in PHASES:
        limited, free = ([pair[side][f"{phase}_tokens_per_second"] for pair in found] for side in (0, 1))
        share = statistics.median(slow / fast for slow, fast in zip(limited, free, strict=True))
        result[phase] = Speed(
            limited=statistics.median(limited), free=statistics.median(free), share=share, pairs=len(found)
        )
    return result


def speeds(bundle: Path, budget: int, repeats: int, most: int) -> tuple[dict[str, Speed], list[str]]:
    """Speed of each phase, and what failed. Which of a pair goes first alternates."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    wanted = repeats
    while len(found) < wanted:
        pair: dict[bool, dict[str, Any]] = {}
        for limited in (True, False) if len(found) % 2 == 0 else (False, True):
            done = run_acceptance(bundle, budget if limited else None)
            if done.document is None:
                return {}, [f"the run {done.process.ending}"]
            pair[limited] = asdict(done.document.speed)
        found.append((pair[True], pair[False]))
        # All of them, and not as many as it takes to pass: that would pick the lucky ones.
        if len(found) == repeats and any(speed.share < LEAST_SHARE for speed in compared(found).values()):
            wanted = most
    result = compared(found)
    return result, [
        f"{phase} at {speed.share:.2f} × its free speed" for phase, speed in result.items() if speed.share < LEAST_SHARE
    ]


def main() -> int:
    parser = make_parser(__doc__, "map", profile="laptop-16gb", repeats=3, json=None)
    parser.add_argument("--context", type=int, default=512, help="tokens of context (default: 512)")
    parser.add_argument("--budgets", nargs="+", metavar="SIZE", help="budgets to build for")
    parser.add_argument("--count", type=int, default=8, help="how many budgets, where none are named (default: 8)")
    parser.add_argument("--most", type=int, default=9, help="pairs of runs where a speed looks too low (default: 9)")
    arguments = parser.parse_args()

    loaded, profile = open_map(arguments.map), load_profile(arguments.profile)
    request = Request(profile=profile, context_tokens=arguments.context, target=Target(fill=True))
    budgets = [parse_size(text, of_bytes=profile.memory_bytes) for text in arguments.budgets or ()] or spread(
        request, loaded, arguments.count
    )
    memory_rows, speed_rows, data, enforced = [], [], [], set()
    for budget in budgets:
        wanted = replace(request, budget_bytes=budget)
        with tempfile.TemporaryDirectory() as scratch, Bars() as bars:
            bundle = Path(scratch, "bundle")
            built = build(loaded, wanted, bundle, validate=True, force=False, progress=bars)
            bars.phase(f"{arguments.repeats} runs with the limit and without", 1)
            by_phase, failed = speeds(bundle, budget, arguments.repeats, max(arguments.repeats, arguments.most))
            bars.advance()
        report = built.report
        assert report is not None
        peak = report.measured.peak_bytes or 0
        rise = float("nan") if report.measured.loss_nats is None else report.measured.loss_nats
        failed = [check.name for check in report.checks if check.passed is False] + failed
        if peak < LEAST_USE * budget and built.plan.prefix:
            failed.append(f"uses {peak / budget:.1%} of a budget that binds")
        if not report.enforced_by:
            failed.append("no limit was enforced")
        enforced.add(report.enforced_by or "nothing")
        memory_rows.append(
            [
                format_size(budget),
                f"{built.plan.file_bytes:,}",
                f"{built.plan.ratio:.1%}",
                format_size(report.rounds[0].predicted_bytes),
                format_size(report.rounds[0].measured_bytes),
                format_size(peak),
                f"{peak / budget:.1%}",
                str(len(report.rounds)),
                f"{built.plan.loss_nats:.4f}",
                f"{rise:.4f}",
            ]
        )
        verdict = "FAILED: " + "; ".join(failed) if failed else "valid"
        speed_rows.append([format_size(budget), *(str(by_phase.get(phase, "-")) for phase in PHASES), verdict])
        data.append(
            {
                "budget_bytes": budget,
                "plan": built.plan.to_dict() | {"choices": None},
                "measured": without_none(report.measured),
                "rounds": [asdict(item) for item in report.rounds],
                "speed": {
                    phase: {"limited": speed.limited, "free": speed.free, "share": speed.share, "pairs": speed.pairs}
                    for phase, speed in by_phase.items()
                },
                "failed": failed,
            }
        )
        print(" | ".join([*memory_rows[-1], *speed_rows[-1][1:]]), flush=True)
    title = (
        f"{arguments.map.name} on {profile.name}, context {arguments.context}; limit enforced by "
        f"{', '.join(sorted(enforced))}"
    )
    show(f"{title}; predicted and measured: the first round's peaks", MEMORY_HEADER, memory_rows)
    show("the same budgets: verdict, and medians of the speed under the limit and without", SPEED_HEADER, speed_rows)
    write_figures(arguments.json, data)
    good = sum(not entry["failed"] for entry in data)
    print(
        f"\n{good} of {len(data)} budgets valid, at {LEAST_SHARE} × the free speed or more, and used to "
        f"{LEAST_USE:.0%} or more where they bind"
    )
    return int(good < len(data))


if __name__ == "__main__":
    sys.exit(main())
