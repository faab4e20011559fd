"""Of every check that failed: what failed, and what to type next."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from packager.runtime import device_check
from packager.validation import rise, validate
from packager.validation.advice import advice, failures
from packager.validation.report import Check

MIB = 1 << 20
GENERAL = "build it again: packager build MAP --profile PROFILE -o BUNDLE --force; if this stays, report it"


def failed(name: str, value: float | str = 3, limit: float | None = 0, unit: str = "") -> Check:
    return Check(name=name, value=value, limit=limit, unit=unit, passed=False)


def every_name() -> list[str]:
    """Of each check that can fail."""
    source = Path(device_check.__file__).read_text(encoding="utf-8")
    found = re.findall(r'\b(?:divergence_)?row\(\s*"([^"]+)"', source)
    return sorted(
        {*found, rise.NAME, validate._GRAPH_ERROR, validate._ADDED_LOSS, "acceptance test on ONNX Runtime GenAI"}
        - {"what this bundle's own report says"}
    )


@pytest.mark.parametrize("name", every_name())
def test_every_check_has_advice_of_its_own(name: str) -> None:
    (step,) = advice([failed(name)])
    assert not step.startswith(GENERAL)
    assert "packager " in step


def test_there_are_as_many_checks_as_are_known() -> None:
    assert len(every_name()) == 12


def test_a_check_that_is_not_known_has_the_general_advice() -> None:
    assert advice([failed("something new")])[0].startswith(GENERAL)


def test_a_peak_over_the_budget_names_the_budget_to_ask_for() -> None:
    check = failed("peak resident memory of the process", 318_070_784, 300 * MIB, "bytes")
    assert failures([check]) == [
        "peak resident memory of the process: 303 MiB, the limit is 300 MiB (3.3 MiB over)",
    ]
    (step,) = advice([check])
    assert step.endswith(
        "or, if the device has it, give the process more: packager build MAP --profile PROFILE -o BUNDLE --force "
        "--budget 310MiB"
    )


def test_a_process_killed_at_the_limit_is_told_of_memory() -> None:
    check = failed("acceptance test on ONNX Runtime GenAI", "was killed at the memory limit (cgroup v2)", None)
    assert failures([check]) == [
        "acceptance test on ONNX Runtime GenAI: was killed at the memory limit (cgroup v2)",
    ]
    assert "--budget SIZE" in advice([check])[0]


def test_the_same_advice_is_given_once_and_none_where_nothing_failed() -> None:
    tokenizer = [failed(f"texts that the tokenizer {how}codes differently") for how in ("en", "de")]
    assert len(failures(tokenizer)) == 2
    assert len(advice(tokenizer)) == 1
    passed = Check(name="x", value=1, limit=2, unit="", passed=True)
    assert failures([passed]) == advice([passed]) == []
