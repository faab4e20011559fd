"""What people read: plans with their terms, frontiers, reports and the builds that led to them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import packager
from packager.bundle.folder import BundleFolder
from packager.bundle.manifest import Bounds, Manifest, Measured, Predicted
from packager.cli.render import description_text, frontier_text, plan_text, profiles_text, report_text
from packager.io.files import dump_json
from packager.memory.model import MemoryEstimate, MemoryItem, MemoryPhase
from packager.planning.plan import Plan
from packager.planning.predicted_memory import predicted_memory
from packager.scoremap.identity import ModelIdentity
from packager.validation.report import Check, Round, ValidationReport, earlier_rounds
from packager.validation.report_page import report_page

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
        Check(
            name="memory limit enforced during the test", value="cgroup v2", limit=200 * MIB, unit="bytes", passed=None
        ),
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


def test_a_report_fits_a_narrow_screen_and_tells_of_every_build() -> None:
    assert report_text(REPORT).splitlines() == [
        "check                                  measured   allowed  verdict",
        "─" * 67,
        "peak resident memory of the process    190 MiB    200 MiB  pass",
        "memory limit enforced during the test  cgroup v2  200 MiB  reported",
        "build 1: predicted peak 180 MiB, not measured, weights 90.0 MiB, context 512",
        "  tokens",
        "build 2: predicted peak 180 MiB, measured 190 MiB, weights 90.0 MiB, context",
        "  512 tokens",
        "VALID",
    ]


def failing(**changes: object) -> ValidationReport:
    check = dataclasses.replace(REPORT.checks[0], passed=False, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(REPORT, checks=(check, REPORT.checks[1]))


def test_a_bundle_that_is_not_valid_names_cause_and_next_step() -> None:
    text = report_text(failing(value=212 * MIB))
    assert "NOT VALID: 1 of 2 checks failed" in text.splitlines()
    flat = " ".join(text.split())
    assert "cause: peak resident memory of the process: 212 MiB, the limit is 200 MiB (12.0 MiB over)" in flat
    assert "next: let the packager measure and plan again within the same budget" in flat
    lost = failing(name="loss that ONNX Runtime adds", value=0.25, limit=0.05, unit="nats/token, either sign")
    flat = " ".join(report_text(lost).split())
    assert "cause: loss that ONNX Runtime adds: 0.25, the limit is 0.05 (nats/token, either sign)" in flat
    assert "next: keep more in float" in flat


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_for_terminals_and_honour_no_color(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in report_text(REPORT)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    assert ("\x1b[32m" in report_text(REPORT)) is not no_color


def test_every_profile_fits_a_narrow_screen() -> None:
    lines = profiles_text(packager.profiles()).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(profile.name) for line in lines) for profile in packager.profiles())


def test_what_is_described_has_sizes_and_short_numbers() -> None:
    described = {
        "kind": "plan",
        "file_bytes": 224 * MIB,
        "loss_nats": 0.054447307840706054,
        "tokens": 32768,
        "seed": 123456,
        "quick": True,
        "acip": None,
        "bits": [2, 4],
        "nothing": {},
        "memory": {"phases": {"load": {"heap freed by the tokenizer": 3 * MIB}}},
    }
    assert description_text(described).splitlines() == [
        "kind                     plan",
        "file_bytes               224 MiB",
        "loss_nats                0.05445",
        "tokens                   32,768",
        "seed                     123456",
        "quick                    yes",
        "acip                     -",
        "bits                     2, 4",
        "nothing",
        "memory",
        "  phases",
        "    load",
        "      heap freed by the tokenizer 3.0 MiB",
    ]


MANIFEST = Manifest(
    schema=1,
    bundle_sha256="2" * 64,
    files=(),
    model=ModelIdentity(
        name="pico <b>",
        source="pico",
        sha256="4" * 64,
        architecture="LlamaForCausalLM",
        parameters=1,
        float16_bytes=2,
        max_context_tokens=512,
    ),
    map_sha256="0" * 64,
    plan_sha256="0" * 64,
    profile="box",
    profile_sha256="1" * 64,
    bounds=Bounds(budget_bytes=200 * MIB, context_tokens=512, prompt_tokens=480, vocabulary=9, provider="cpu"),
    cache="int8",
    predicted=REPORT.predicted,
    units=(),
    versions={},
)


def test_the_page_is_whole_in_itself_and_starts_with_the_verdict() -> None:
    page = report_page(REPORT, MANIFEST)
    assert page.startswith('<!doctype html>\n<html lang="en">')
    for part in ('name="viewport"', "prefers-color-scheme:dark", "@media print", "<h1>VALID</h1>"):
        assert part in page
    assert "pico &lt;b&gt;" in page
    assert "<b>" not in page.replace("<b>pass</b>", "").replace("<b>reported</b>", "")
    assert not re.search(r"<script|<link|<img|https?://|url\(|@import", page)
    assert "<li>build 1: predicted peak 180 MiB, not measured, weights 90.0 MiB, context 512 tokens</li>" in page
    assert not re.search(r"[0-9]{7,}", page.replace("2" * 64, ""))
    bad = report_page(failing(value=300 * MIB), MANIFEST)
    assert bad.index("NOT VALID: 1 of 2") < bad.index("cause: peak resident") < bad.index("<h2>Checks</h2>")


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
