"""Families whose layers are not LLaMA's, from model to valid bundle: each kind of layer, packing and norm once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import profile  # noqa: F401  the fixture is used by name
from test_methods import built_at_half

from packager.scoremap.identity import read_identity


@pytest.mark.parametrize("name", ["granite hybrid", "lfm2", "nemotron", "qwen3.5"])
def test_from_model_to_valid_bundle(name: str, maps: Callable[[str], Path], profile: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = maps(name)
    _, report = built_at_half(folder, profile, tmp_path / "out.bundle")
    assert report["passed"] is True
    identity = read_identity(folder)
    hybrid = name in ("lfm2", "qwen3.5")
    assert identity.int8_cache is not None
    assert bool(identity.int8_cache.refusal) == hybrid
    assert (identity.geometry.cacheless_layers > 0) == hybrid
    assert (identity.geometry.hybrid_bytes > 0) == hybrid
