"""The score map's file: what is written is read, its bytes do not depend on the run, and damage is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from packager.errors import ArtifactError
from packager.io.safetensors_ranges import read_header
from packager.scoremap.folder import SCOREMAP_FILE
from packager.scoremap.identity import read_identity
from packager.scoremap.model import ScoreMap, map_tensors, read_map


@pytest.fixture
def folder(maps: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the LLaMA's score map to damage."""
    return Path(shutil.copytree(maps("llama"), tmp_path / "copy.map"))


def rewrite(folder: Path, scoremap: ScoreMap) -> None:
    arrays, metadata = map_tensors(scoremap)
    save_file(arrays, folder / SCOREMAP_FILE, metadata=metadata)


def changed(folder: Path, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> None:
    """Change one array of the map's file."""
    _, metadata = read_header(folder / SCOREMAP_FILE)
    arrays = load_file(folder / SCOREMAP_FILE)
    change(arrays[name])
    save_file(arrays, folder / SCOREMAP_FILE, metadata=metadata)


def message(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_map(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_map_is_read_as_it_was_written(folder: Path) -> None:
    scoremap = read_map(folder)
    assert len(scoremap.units) == 15
    assert all(unit.elements == unit.rows * unit.cols > 0 for unit in scoremap.units)
    rewrite(folder, scoremap)
    assert read_map(folder) == scoremap


def test_a_map_is_always_the_same_bytes(folder: Path) -> None:
    """Its hash names it in every plan."""
    scoremap = read_map(folder)
    found = set()
    for _ in range(32):
        rewrite(folder, scoremap)
        found.add((folder / SCOREMAP_FILE).read_bytes())
    assert len(found) == 1


def test_identity_names_every_file_by_hash(maps: Callable[[str], Path]) -> None:
    identity = read_identity(maps("llama"))
    files = {path.relative_to(maps("llama")).as_posix() for path in maps("llama").rglob("*") if path.is_file()}
    assert set(identity.files) == files - {"map.json"}


def test_another_map_is_not_the_one_named(folder: Path) -> None:
    changed(folder, "option_loss_nats", lambda losses: losses.__imul__(1.5))
    read_map(folder)
    with pytest.raises(
        ArtifactError,
        match=(
            r"scoremap\.safetensors is not the file that map\.json names \(sha256 [0-9a-f]{12}…\): "
            r"score the model again$"
        ),
    ):
        read_identity(folder)


def test_bytes_that_are_not_a_forms_are_refused(folder: Path) -> None:
    changed(folder, "option_bytes", lambda sizes: sizes.__iadd__(1))
    assert "claims" in message(folder)
    assert message(folder).startswith(f"{folder / SCOREMAP_FILE}: units['")


def test_losses_that_are_not_finite_are_refused(folder: Path) -> None:
    changed(folder, "option_loss_nats", lambda losses: losses.fill(np.nan))
    assert "claims" in message(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('"q8g64"', '"q8g65"', id="an unknown form"),
        pytest.param('"linear"', '"lineal"', id="an unknown kind"),
        pytest.param('"cols"', '"cold"', id="an unknown key"),
        pytest.param('"rows": 64', '"rows": "a"', id="rows a text"),
        pytest.param("{", "3, {", id="a unit a number"),
    ],
)
def test_units_that_make_no_sense_are_refused(folder: Path, old: str, new: str) -> None:
    path = folder / SCOREMAP_FILE
    metadata, arrays = read_header(path)[1], load_file(path)
    assert any(old in value for value in metadata.values())
    save_file(arrays, path, metadata={key: value.replace(old, new, 1) for key, value in metadata.items()})
    assert message(folder).startswith(f"{path}")


def test_moves_out_of_order_are_refused(folder: Path) -> None:
    changed(folder, "moves", lambda moves: moves.__setitem__(slice(None), moves[::-1].copy()))
    assert message(folder) == (
        f"{folder / SCOREMAP_FILE}: its moves are not in the order of its losses: the file is damaged, score "
        "the model again"
    )


def test_a_map_cut_short_is_refused(folder: Path) -> None:
    path = folder / SCOREMAP_FILE
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert message(folder).startswith(f"{path} is damaged (")


def test_a_folder_without_map(tmp_path: Path) -> None:
    assert (
        message(tmp_path)
        == f"{tmp_path} is not a score map ({SCOREMAP_FILE} is missing): make one with 'packager score'"
    )


def test_a_map_of_the_schema_before_says_to_score_again(folder: Path) -> None:
    path = folder / SCOREMAP_FILE
    metadata, arrays = read_header(path)[1], load_file(path)
    save_file(
        arrays, path, metadata={key: value.replace('"schema": 2', '"schema": 1') for key, value in metadata.items()}
    )
    assert message(folder) == f"{path} has schema 1, this version reads 2: score the model again"
