"""What lies in a map, by the names that one place gives it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from packager.errors import ArtifactError
from packager.forms.registry import parse_form
from packager.io.safetensors_ranges import sha256_region
from packager.scoremap.folder import MapFolder, store_key
from packager.scoremap.opening import open_map
from packager.scoremap.reference import HeldOut, ReferenceFile


def test_every_file_of_a_map_has_a_name(maps: Callable[[str], Path]) -> None:
    folder = MapFolder(root=maps("llama"))
    skeleton = folder.skeleton("cpu")
    named = {folder.identity, folder.scoremap, folder.store, folder.digests, folder.reference.path}
    named |= {skeleton.graph, skeleton.genai_config, *folder.side_files()}
    assert {path for path in folder.root.rglob("*") if path.is_file()} == named
    assert folder.exists()
    assert not MapFolder(root=folder.root / "nowhere").exists()


def test_a_skeleton_for_another_provider_is_an_error(maps: Callable[[str], Path]) -> None:
    with pytest.raises(ArtifactError, match=r"has no graph for cuda: score the model again with --provider cuda$"):
        MapFolder(root=maps("llama")).skeleton("cuda")


def test_the_store_says_where_the_bytes_of_an_option_lie(maps: Callable[[str], Path], tmp_path: Path) -> None:
    opened = open_map(maps("llama"))
    store = opened.folder.open_store()
    unit, option = opened.scoremap.units[0], opened.scoremap.options[0][-1]
    regions = store.placement_regions(unit.name, option.form, unit.rows, unit.cols)
    assert {name: region.length for name, region in regions.items()} == {
        name: spec.bytes for name, spec in option.form.tensors(unit.rows, unit.cols).items()
    }
    for name, region in regions.items():
        assert sha256_region(region) == store.digests[store_key(unit.name, option.form.label, name)]
    with pytest.raises(ArtifactError, match=r"store and map do not belong together"):
        store.placement_regions("nothing", parse_form("f32"), 4, 4)
    folder = MapFolder(root=Path(shutil.copytree(maps("llama"), tmp_path / "copy.map")))
    damaged = folder.open_store()
    with folder.store.open("r+b") as file:
        file.seek(next(iter(regions.values())).offset)
        file.write(b"\xff\xfe\xfd")
    with pytest.raises(ArtifactError, match=r"are not those that were scored: the store is damaged"):
        damaged.placement_regions(unit.name, option.form, unit.rows, unit.cols)


def test_a_reference_file_gives_back_what_was_written(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    vectors = {"model.norm.weight": generator.normal(size=8).astype(np.float32)}
    held_out = HeldOut(
        windows=generator.integers(0, 99, (2, 6)), source_nats=generator.random((2, 5)).astype(np.float32)
    )
    scales = {layer: tuple(generator.random((1, 4)).astype(np.float32) for _ in range(2)) for layer in (0, 11)}
    file = ReferenceFile(path=tmp_path / "reference.safetensors")
    file.write(vectors, held_out, scales)  # type: ignore[arg-type]
    assert {name: vector.tolist() for name, vector in file.vectors().items()} == {
        name: vector.tolist() for name, vector in vectors.items()
    }
    found = file.held_out()
    assert (found.windows == held_out.windows).all()
    assert (found.source_nats == held_out.source_nats).all()
    assert (found.cut(3).windows.shape, found.cut(3).source_nats.shape) == ((2, 3), (2, 2))
    assert list(file.kv_scales()) == [0, 11]
    assert all(
        (a == b).all() for layer, pair in file.kv_scales().items() for a, b in zip(pair, scales[layer], strict=True)
    )


def test_a_reference_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    file = ReferenceFile(path=tmp_path / "reference.safetensors")
    with pytest.raises(ArtifactError, match=r"reference.safetensors cannot be read"):
        file.held_out()
    file.path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"reference.safetensors cannot be read"):
        file.vectors()
