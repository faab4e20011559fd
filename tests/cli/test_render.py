"""What people read: plans with their terms, frontiers, reports and the builds that led to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from packager.bundle.folder import BundleFolder
from packager.bundle.manifest import Measured, Predicted
from packager.cli.render import frontier_text, plan_text, report_text
from packager.io.files import dump_json
from packager.memory.model import MemoryEstimate, MemoryItem, MemoryPhase
from packager.planning.plan import Plan
from packager.planning.predicted_memory import predicted_memory
from packager.validation.page import to_html
from packager.validation.report import Check, Round, ValidationReport, earlier_rounds

MIB = 1 << 20
MEMORY = MemoryEstimate(
    phases=(
        MemoryPhase(name="load", items=(MemoryItem(name="process", bytes=30 * MIB),)),
        MemoryPhase(
            name="prefill",
            items=tuple(
                MemoryItem(name=name, bytes=size * MIB)
                for name, size in (("process", 40), ("weights", 120), ("kv cache", 20))
            ),
        ),
    )
)
PLAN = Plan(
    schema=1,
    map_sha256="0" * 64,
    profile="box",
    profile_sha256="1" * 64,
    budget_bytes=200 * MIB,
    context_tokens=512,
    prompt_tokens=480,
    choices={"a": "q4g64z", "b": "q8g64", "c": "q4g64z"},
    prefix=7,
    moves=9,
    file_bytes=100 * MIB,
    ratio=0.25,
    loss_nats=0.0456,
    peak_bytes=180 * MIB,
    memory=predicted_memory(MEMORY),
    cache="int8",
    cache_nats=0.0012,
    cache_note="with a float cache the loss would be +0.0500",
)
ROUND = Round(
    context_tokens=512,
    cache="int8",
    file_bytes=90 * MIB,
    loss_nats=0.05,
    predicted_bytes=180 * MIB,
    measured_bytes=190 * MIB,
    reserve_bytes=0,
)
PLAIN = dataclasses.asdict(ROUND)
REPORT = ValidationReport(
    bundle_sha256="2" * 64,
    checks=(
        Check(name="peak resident memory of the process", value=190 * MIB, limit=200 * MIB, unit="bytes", passed=True),
        Check(name="memory limit enforced during the test", value="cgroup v2", limit=200 * MIB, unit="", passed=None),
    ),
    enforced_by="cgroup v2",
    measured=Measured(),
    predicted=Predicted(peak_bytes=180 * MIB, loss_nats=0.0456, file_bytes=100 * MIB, memory=predicted_memory(MEMORY)),
    answer=None,
    rounds=(dataclasses.replace(ROUND, measured_bytes=0), ROUND),
)


def test_a_plan_shows_every_term_with_a_bar_and_what_is_left() -> None:
    assert plan_text(PLAN).splitlines() == [
        "profile      box: budget 200 MiB, context 512 tokens",
        "chosen       100 MiB of weights, 25.0% of the float16 model (7 of 9 compression steps taken)",
        "forms        2 × q4g64z, 1 × q8g64",
        "cache        int8 (+0.0012 nats): with a float cache the loss would be +0.0500",
        "predicted    loss +0.0456 nats per token; peak 180 MiB in prefill",
        "  process                        40.0 MiB  ██████",
        "  weights                         120 MiB  ██████████████████",
        "  kv cache                       20.0 MiB  ███",
        "  fits, left                     20.0 MiB",
    ]


def test_a_plan_beyond_its_budget_says_so() -> None:
    """A later round of the closed loop, after an earlier one measured below its prediction."""
    assert (
        plan_text(dataclasses.replace(PLAN, budget_bytes=170 * MIB)).splitlines()[-1]
        == "  beyond it, as measured less    10.0 MiB"
    )


def test_a_context_cut_to_the_models_own_is_said() -> None:
    expected = "profile      box: budget 200 MiB, context 512 tokens, all that the model was made for (box has 8192)"
    assert plan_text(PLAN, 8192).splitlines()[0] == expected
    assert plan_text(PLAN, 512) == plan_text(PLAN)


def test_a_frontier_names_the_cache_of_every_row() -> None:
    longer = dataclasses.replace(PLAN, context_tokens=4096, cache="float", loss_nats=0.2)
    assert frontier_text([PLAN, longer]).splitlines() == [
        "context against weights within 200 MiB ('--context N' takes another row)",
        "    context  cache    weights   ratio  loss, nats       peak",
        "        512   int8    100 MiB   25.0%     +0.0456    180 MiB  taken",
        "       4096  float    100 MiB   25.0%     +0.2000    180 MiB",
    ]


def test_a_report_tells_of_every_build() -> None:
    rounds = [
        "build 1: predicted peak 180 MiB, not measured, weights 90.0 MiB, context 512 tokens",
        "build 2: predicted peak 180 MiB, measured 190 MiB, weights 90.0 MiB, context 512 tokens",
    ]
    assert report_text(REPORT).splitlines()[-3:] == [*rounds, "VALID"]
    assert all(f"<li>{line}</li>" in to_html(REPORT) for line in rounds)


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (dump_json(REPORT.to_dict()), 2),
        (dump_json(REPORT.to_dict() | {"bundle_sha256": "3" * 64}), 0),
        (dump_json(REPORT.to_dict() | {"rounds": 3}), 0),
        (dump_json(REPORT.to_dict() | {"rounds": [3, {}, PLAIN | {"file_bytes": "90 MiB"}, PLAIN]}), 1),
        ("{", 0),
        (None, 0),
    ],
)
def test_earlier_builds_are_kept_by_a_report_of_the_same_bundle(tmp_path: Path, content: str | None, kept: int) -> None:
    if content is not None:
        BundleFolder(root=tmp_path).report.write_text(content)
    found = earlier_rounds(tmp_path, REPORT.bundle_sha256)
    assert found == REPORT.rounds[len(REPORT.rounds) - kept :]
