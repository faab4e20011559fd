"""A bundle is written once: what comes to it later changes no byte that it need not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from packager.bundle.folder import UNLISTED, BundleFolder, role_of
from packager.bundle.manifest import Polish, parse_manifest
from packager.bundle.opening import OpenedBundle, open_bundle
from packager.bundle.weights import overwrite_scales, unit_tensors
from packager.bundle.writer import Recipe, stage, with_golden, with_scales, write_manifest
from packager.errors import ArtifactError
from packager.forms.registry import BlockForm
from packager.io.files import read_json, sha256_file
from packager.planning.plan import Request, smallest_memory
from packager.profile import load_profile
from packager.scoremap.opening import open_map

POLISH = Polish(
    minutes=0.5,
    steps=3,
    text="a text",
    heldout_divergence_before_nats=0.2,
    heldout_divergence_after_nats=0.1,
    units=1,
)


@pytest.fixture
def bundle(maps: Callable[[str], Path], tmp_path: Path) -> OpenedBundle:
    """The smallest model of a map, staged."""
    source, profile = open_map(maps("llama")), dataclasses.replace(load_profile("edge-box-256mb"), context_tokens=64)
    budget = smallest_memory(source.with_cache("float"), profile, 64).peak_bytes
    plan = Request(profile=profile, budget_bytes=budget, cache="float").plan(source)
    return stage(Recipe(source=source, plan=plan, profile=profile), tmp_path / "out.bundle")


def test_a_staged_bundle_opens_once_its_manifest_is_written(bundle: OpenedBundle) -> None:
    root = bundle.folder.root
    assert not bundle.folder.exists()
    write_manifest(bundle)
    assert open_bundle(root) == bundle
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {entry.path for entry in bundle.manifest.files} == there - UNLISTED
    assert all(entry.role == role_of(entry.path) for entry in bundle.manifest.files)


def test_tuned_scales_take_the_place_of_the_old_and_of_nothing_else(bundle: OpenedBundle) -> None:
    unit = next(unit for unit in bundle.manifest.units if isinstance(unit.parsed(), BlockForm))
    graph = ir.load(bundle.folder.graph).graph
    before = {item.name: unit_tensors(graph, item) for item in bundle.manifest.units}
    old = {(name, part): tensor.numpy().copy() for name, parts in before.items() for part, tensor in parts.items()}
    hash_of_graph = sha256_file(bundle.folder.graph)
    scales = old[unit.name, "scales"] * np.float32(1.5)
    tuned = with_scales(bundle, {unit.name: scales}, POLISH)
    write_manifest(tuned)
    assert open_bundle(bundle.folder.root) == tuned
    assert tuned.manifest.polish == POLISH
    assert sha256_file(bundle.folder.graph) == hash_of_graph
    changed = [new.path for new, entry in zip(tuned.manifest.files, bundle.manifest.files, strict=True) if new != entry]
    assert changed == ["onnx/model_q4.onnx_data"]
    graph = ir.load(bundle.folder.graph).graph
    for item in bundle.manifest.units:
        for part, tensor in unit_tensors(graph, item).items():
            expected = scales if (item.name, part) == (unit.name, "scales") else old[item.name, part]
            assert (tensor.numpy() == expected).all()


def test_scales_of_another_size_are_refused(bundle: OpenedBundle) -> None:
    unit = next(unit for unit in bundle.manifest.units if isinstance(unit.parsed(), BlockForm))
    with pytest.raises(ArtifactError, match=rf"{unit.name} has no scales of 8 bytes$"):
        overwrite_scales(bundle.folder.graph, {unit.name: np.ones(2, np.float32)})


def test_a_golden_file_is_listed_in_its_place(bundle: OpenedBundle) -> None:
    bundle.folder.golden.write_bytes(b"golden")
    found = with_golden(bundle)
    paths = [entry.path for entry in found.manifest.files]
    assert paths == sorted(paths)
    assert next(entry for entry in found.manifest.files if entry.role == "golden").bytes == 6
    assert found.manifest.bundle_sha256 != bundle.manifest.bundle_sha256


def test_a_manifest_says_only_what_there_is(bundle: OpenedBundle) -> None:
    write_manifest(bundle)
    assert not {"measured", "polish"} & set(read_json(bundle.folder.manifest))
    data = read_json(bundle.folder.manifest) | {"measured": {"peak_bytes": 7, "loss_nats": 0.5}}
    manifest = parse_manifest(data, "packager.json")
    assert manifest.measured is not None
    assert (manifest.measured.peak_bytes, manifest.measured.torch_heldout_nats) == (7, None)
    assert manifest.to_dict()["measured"] == {"peak_bytes": 7, "loss_nats": 0.5}
    with pytest.raises(ArtifactError, match=r"packager.json: measured: key 'surprise' is unknown"):
        parse_manifest(data | {"measured": {"surprise": 1}}, "packager.json")


def test_every_path_of_a_bundle_lies_in_its_folder(tmp_path: Path) -> None:
    folder = BundleFolder(root=tmp_path)
    assert folder.graph.parent == folder.weights.parent == tmp_path / "onnx"
    assert {folder.plan.name, folder.profile.name, folder.card.name} == {"plan.json", "profile.toml", "README.md"}
