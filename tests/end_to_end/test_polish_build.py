"""`build --polish`: scales tuned for one size, in a bundle that is as valid and as large as without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from conftest import Pico
from test_cli import least_budget, packager_, succeed
from test_cli import profile as profile  # a fixture

from packager.bundle.folder import GRAPH_FILE


def scales_of(bundle: Path) -> dict[str, np.ndarray]:
    graph = ir.load(bundle / GRAPH_FILE).graph
    return {
        name: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if name.endswith(".scales") and value.const_value is not None
    }


def test_a_polished_bundle_differs_in_scales_alone_and_is_valid(
    taught: Pico, maps: Callable[[str], Path], calibration_text: Path, profile: Path, tmp_path: Path
) -> None:
    folder, plain, polished = maps("taught"), tmp_path / "plain.bundle", tmp_path / "polished.bundle"
    common = (
        "build",
        folder,
        "--profile",
        profile,
        "--budget",
        least_budget(folder, profile) + 6_000,
        "--no-validate",
        "--json",
    )
    first = succeed(*common, "-o", plain).json
    assert first["polish"] is None
    done = succeed(
        *common, "-o", polished, "--polish", 0.08, "--model", taught.folder, "--calibration", calibration_text
    )
    assert done.json["plan"] == first["plan"]
    assert succeed("validate", polished, "--json").json["passed"] is True
    said = done.json["polish"]
    assert said["steps"] > 0
    assert said["heldout_divergence_after_nats"] < said["heldout_divergence_before_nats"]
    assert json.loads((polished / "packager.json").read_text())["polish"] == said
    before, after = scales_of(plain), scales_of(polished)
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert 0 < said["units"] == len(moved)
    assert not any("embed" in name or "lm_head" in name for name in moved)
    assert (plain / f"{GRAPH_FILE}_data").stat().st_size == (polished / f"{GRAPH_FILE}_data").stat().st_size


def test_polish_needs_the_map_s_own_model(
    taught: Pico, picos: Callable[[str], Pico], maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    arguments = (
        "build",
        maps("taught"),
        "--profile",
        profile,
        "-o",
        tmp_path / "out.bundle",
        "--no-validate",
        "--polish",
    )
    done = packager_(*arguments)
    assert (done.code, "--model FOLDER" in done.err) == (2, True), done.err
    assert packager_(*arguments, "-1", "--model", taught.folder).code == 2
    done = packager_(*arguments, "0.01", "--model", picos("llama").folder)
    assert done.code == 2
    assert "is not the model of the map" in done.err
    assert not (tmp_path / "out.bundle").exists()
