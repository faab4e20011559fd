"""Whatever bytes a file holds, its reader gives a value or an error of the package's own: never another exception.

FUZZ_CASES sets how many cases are tried, of all readers together; `make fuzz` tries many. What was found once is kept
in test_found_cases.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged
from readers import Reader, every_reader, refused

CASES = int(os.environ.get("FUZZ_CASES", "500"))
COUNTS: Counter[str] = Counter()


@pytest.fixture(scope="module")
def readers(
    tmp_path_factory: pytest.TempPathFactory, maps: Callable[[str], Path], picos: Callable[[str], Any]
) -> dict[str, Reader]:
    return every_reader(tmp_path_factory.mktemp("fuzz"), maps, picos)


NAMES = (
    "map.json", "scoremap.safetensors", "store.json", "store.safetensors", "reference.safetensors", "plan.json",
    "signed plan.json", "packager.json", "signed packager.json", "SHA256SUMS", "signed genai_config.json",
    "genai_config.json", "signed config.json", "signed tokenizer_config.json", "signed model_q4.onnx",
    "signed profile.toml", "report.json", "profile.toml", "size", "safetensors", "gguf", "config.json",
    "generation_config.json", "lines.jsonl", "all.json", "table.csv", "plain.txt",
)  # fmt: skip
NEVER_ACCEPTED = ("packager.json",)
"""Files of which no changed bit is accepted where nothing else was changed to fit."""


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_end_in_a_value_or_an_error_of_ours(readers: dict[str, Reader], name: str) -> None:
    reader = readers[name]
    content = reader.file.read_bytes()
    assert not refused(reader, content), "the file is refused as it is"

    @settings(
        max_examples=max(1, CASES // len(NAMES)),
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=CASES <= 1000,
    )
    @given(st.integers(0, 2**48))
    def try_one(seed: int) -> None:
        other = damaged(content, reader.kind, random.Random(seed))
        COUNTS["cases"] += 1
        found = refused(reader, other)
        COUNTS["refused"] += found
        if name in NEVER_ACCEPTED and other != content:
            assert found, "a changed file is accepted"

    try:
        try_one()
    except BaseException:
        COUNTS["outside"] += 1
        raise


def test_the_totals_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        cases, named, outside = (COUNTS[name] for name in ("cases", "refused", "outside"))
        print(f"\n{cases} cases, {named} refused in words, {outside} outside the error tree")
    assert COUNTS["outside"] == 0
