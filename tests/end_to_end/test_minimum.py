"""Budgets at what the smallest model is predicted to need: they fit, or the least that does is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import packager
from packager.errors import InfeasibleBudgetError
from packager.planning.plan import smallest_memory
from packager.profile import load_profile
from packager.progress import Silent

MIB = 1 << 20


class Listener(Silent):
    """Remembers what it is warned of."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, message: str) -> None:
        self.said.append(message)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_smallest_model_fits_or_says_what_it_needs(name: str, maps: Callable[[str], Path], tmp_path: Path) -> None:
    opened = packager.open_map(maps(name))
    profile = replace(load_profile("laptop-16gb"), context_tokens=256, kv_cache="float")
    budget = smallest_memory(opened, profile, 256).peak_bytes
    listener = Listener()
    refused, out = None, tmp_path / "at.bundle"
    try:
        built = packager.build(opened, profile=profile, budget=budget, out=out, progress=listener)
    except InfeasibleBudgetError as error:
        refused = error
    assert any(
        "within the prediction's error (20.0 MiB) of the smallest model's need" in text for text in listener.said
    )
    if refused is not None:
        said = re.fullmatch(
            r"measured .*; by that the smallest model needs .*: give at least (\d+) MiB", first_line(refused)
        )
        assert said is not None
        enough = int(said[1]) * MIB
        assert budget < refused.minimum_bytes <= enough
        # One MiB more, for two runs of one bundle differ by some pages.
        built = packager.build(opened, profile=profile, budget=enough + MIB, out=out)
    assert built.report is not None
    assert [check.name for check in built.report.checks if "memory" in check.name and check.passed is False] == []


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
