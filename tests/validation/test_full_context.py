"""Logits at the end of long prompts: what is wrong only there is found, and which lengths are tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PICO, random_model
from transformers import PreTrainedTokenizerFast

import packager
from packager.bundle.golden import has_contexts
from packager.memory.geometry import Geometry
from packager.validation.context_lengths import BEYOND, MOST_FILLED, context_lengths
from packager.validation.report import Check, ValidationReport

ROW = "divergence at the end of a full context"
PROFILE = """\
[device]
description = "room for a pico model, whatever the process needs on this machine"
memory = "1GiB"
budget = "50%"
threads = 1

[runtime]
chunk_tokens = 32

[context]
tokens = 640

[memory]
process_bytes = 134217728
process_load_bytes = 134217728
"""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 512,
    "factor": 2.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0 + 0.1 * at for at in range(8)],
    "long_factor": [2.0 + 0.5 * at for at in range(8)],
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "pico-box.toml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="module")
def longrope_map(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, calibration_text: Path
) -> Path:
    """The map of a model whose rotary embedding is another past 512 tokens."""
    folder = tmp_path_factory.mktemp("longrope")
    model = random_model("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=512)
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "model")
    packager.score(folder / "model", out=folder / "phi.map", calibration=calibration_text, tokens=2048, quick=True)
    return folder / "phi.map"


def row_of(report: ValidationReport | None) -> Check:
    assert report is not None
    return next(check for check in report.checks if check.name == ROW)


def test_a_bundle_that_is_wrong_only_in_a_long_prompt_is_not_valid(
    longrope_map: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces of a prompt made smaller than the whole: the first get the rotary embedding of short prompts."""
    right = packager.build(longrope_map, profile=profile, out=tmp_path / "right.bundle")
    row = row_of(right.report)
    assert row.passed, row
    assert row.unit == "nats, the worst after 608 tokens, 552 tokens (past 512)"
    assert has_contexts(tmp_path / "right.bundle" / "golden.safetensors")
    monkeypatch.setattr(Geometry, "chunk_tokens", lambda self, wanted, context_tokens: wanted)
    wrong = packager.build(longrope_map, profile=profile, out=tmp_path / "wrong.bundle")
    assert wrong.report is not None
    assert not wrong.report.passed
    assert [check.name for check in wrong.report.checks if check.passed is False] == [ROW]
    (tmp_path / "wrong.bundle" / "report.json").unlink()
    assert row_of(packager.validate(tmp_path / "wrong.bundle")).passed is False


def config_of(name: str, **changes: Any) -> Any:
    config = PICO[name][1]()
    for key, value in changes.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    ("changes", "context", "prompts", "left_out"),
    [
        pytest.param({}, 512, {0: 480}, (), id="nothing is named"),
        pytest.param({"sliding_window": 48}, 512, {0: 480, 48: 88}, (), id="a window"),
        pytest.param({"sliding_window": 490}, 512, {0: 480, 490: 511}, (), id="a window at the context's end"),
        pytest.param({"sliding_window": 511}, 512, {0: 480}, (), id="a window that no prompt passes"),
        pytest.param({}, 100_000, {0: MOST_FILLED}, (), id="a context too long for the reference"),
        pytest.param(
            {"sliding_window": 20_000, "original_max_position_embeddings": 50_000},
            100_000,
            {0: MOST_FILLED, 20_000: 20_000 + BEYOND},
            (50_000,),
            id="a length too long for the reference",
        ),
    ],
)
def test_prompts_fill_the_context_and_pass_every_length_that_the_configuration_names(
    changes: dict[str, Any], context: int, prompts: dict[int, int], left_out: tuple[int, ...]
) -> None:
    config = config_of("llama", max_position_embeddings=131_072, **changes)
    found = context_lengths(config, context - 32, context)
    assert (dict(found.prompts), found.left_out) == (prompts, left_out)


def test_attention_that_holds_every_score_is_given_shorter_prompts() -> None:
    config = config_of("llama", max_position_embeddings=131_072, num_attention_heads=128)
    config._attn_implementation = "eager"
    assert context_lengths(config, 8000, 8032).prompts[0] == 2048


def test_logits_that_are_no_numbers_are_over_every_limit() -> None:
    from packager.runtime.device_check import divergence_row, kl_divergence

    broken = kl_divergence(np.zeros(4, np.float32), np.full(4, np.nan, np.float32))
    found = divergence_row(ROW, [0.0, broken, 0.01], "nats")
    assert (found["value"], found["passed"]) == ("not a number", False)


def test_a_golden_file_of_an_earlier_version_is_completed_for_the_occasion(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packager.bundle.golden import GoldenContexts

    with monkeypatch.context() as before:
        before.setattr("packager.validation.reference.golden_contexts", lambda *_: GoldenContexts(prompts=[]))
        packager.build(maps("mistral"), profile=profile, out=tmp_path / "old.bundle")
    assert not has_contexts(tmp_path / "old.bundle" / "golden.safetensors")
    row = row_of(packager.validate(tmp_path / "old.bundle"))
    assert row.passed
    assert row.unit == "nats, the worst after 608 tokens, 88 tokens (past 48)"
