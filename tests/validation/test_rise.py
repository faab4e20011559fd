"""The rise of the loss over the source model has a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import packager
from packager.io.files import dump_json, sha256_file, sha256_json
from packager.validation.rise import NAME, rise_check

WINDOWS, TOKENS = 4, 256


@pytest.mark.parametrize(
    ("predicted", "measured", "passed"),
    [
        (0.01, 0.0599, True),
        (0.01, 0.0601, False),
        (0.01, -1.0, True),
        (0.4, 0.599, True),
        (0.4, 0.601, False),
        (-0.02, 0.029, True),
        (-0.02, 0.031, False),
    ],
)
def test_a_rise_fails_beyond_the_prediction_and_its_margin(predicted: float, measured: float, passed: bool) -> None:
    source = np.random.default_rng(0).normal(3.0, 1.0, (WINDOWS, TOKENS))
    check = rise_check(source, source + measured, predicted)
    assert check.passed is passed
    assert check.value == pytest.approx(measured)
    assert check.unit == f"nats/token; predicted {predicted:.4f}, standard error 0.0000"


def test_noise_of_the_measurement_widens_the_limit() -> None:
    source = np.full((WINDOWS, TOKENS), 3.0)
    # One step for each of 16 blocks: their standard error is 0.4 / sqrt(15).
    rises = 0.1 + 0.4 * np.repeat([1.0, -1.0] * 8, 64).reshape(WINDOWS, TOKENS)
    check = rise_check(source, source + rises, 0.02)
    assert check.passed
    assert check.limit == pytest.approx(0.02 + 0.05 + 3 * 0.4 / 15**0.5)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_loss_that_is_no_number_fails(broken: float) -> None:
    source = np.full((WINDOWS, TOKENS), 3.0)
    found = source.copy()
    found[1, 7] = broken
    check = rise_check(source, found, 0.5)
    assert (check.value, check.passed) == ("not a number", False)
    json.dumps([check.value, check.limit], allow_nan=False)


def test_a_bundle_of_other_weights_than_its_source_s_is_not_valid(maps: Callable[[str], Path], tmp_path: Path) -> None:
    """Its graph and its reference agree, for both are made of the wrong weights: only the source's losses tell."""
    bundle = tmp_path / "taught.bundle"
    built = packager.build(maps("taught"), profile="laptop-16gb", context=256, out=bundle, validate=False)
    row = next(check for check in packager.validate(bundle).checks if check.name == NAME)
    assert row.passed, row
    assert isinstance(row.value, float)
    assert row.value < built.plan.loss_nats + 0.05
    reference = bundle / "reference.safetensors"
    tensors = load_file(reference)
    tensors["heldout_nats"] = tensors["heldout_nats"] - 0.5  # as if the source had been a better model
    save_file(tensors, reference)
    _admit(bundle, reference)
    report = packager.validate(bundle)
    assert [check.name for check in report.checks if check.passed is False] == [NAME]


def _admit(bundle: Path, changed: Path) -> None:
    """Sign a bundle again, one of whose files is another now."""
    manifest = json.loads((bundle / "packager.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == changed.name:
            entry |= {"bytes": changed.stat().st_size, "sha256": sha256_file(changed)}
    manifest["bundle_sha256"] = sha256_json(manifest["files"])
    (bundle / "packager.json").write_text(dump_json(manifest))
    listed = [*manifest["files"], {"sha256": sha256_file(bundle / "packager.json"), "path": "packager.json"}]
    (bundle / "SHA256SUMS").write_text("".join(f"{entry['sha256']}  {entry['path']}\n" for entry in listed))
