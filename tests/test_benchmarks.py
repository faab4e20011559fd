"""The benchmarks take minutes to hours; here each must find all it imports. The one that compares artefacts runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = sorted(path.name for path in FOLDER.glob("*.py") if "= make_parser(" in path.read_text(encoding="utf-8"))


def start(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_benchmark_has_the_shared_parser() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} - set(NAMES) == {
        "common.py",
        "runtime_probe.py",
        "small_tokenizers.py",
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_starts(name: str) -> None:
    done = start(name, "--help")
    assert done.returncode == 0, done.stderr
    assert name in done.stdout


@pytest.fixture
def artefacts(tmp_path: Path) -> tuple[Path, Path]:
    """Two tiny maps, equal but for a version and the hashes that follow from it."""
    folders = tmp_path / "old.map", tmp_path / "new.map"
    for number, folder in enumerate(folders):
        (folder / "skeleton").mkdir(parents=True)
        (folder / "skeleton" / "model.onnx").write_bytes(b"graph")
        identity = {
            "schema": 1,
            "versions": {"packager": f"0.{number}"},
            "model": {"name": "pico", "sha256": "ab"},
            "files": {"store.json": f"hash {number}"},
            "anchors": [{"predicted_nats": 0.5}, {"predicted_nats": 1.5}],
        }
        (folder / "map.json").write_text(json.dumps(identity))
        save_file({"a": np.zeros(4, np.uint8), "b": np.ones((2, 3), np.float32)}, folder / "store.safetensors")
    return folders


def test_versions_and_hashes_may_differ(artefacts: tuple[Path, Path]) -> None:
    done = start("compare_artefacts.py", *artefacts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal    store.safetensors" in done.stdout
    assert 'ignored  map.json: versions.packager: "0.0" → "0.1"' in done.stdout
    assert "2 files equal, 0 differences, 2 ignored" in done.stdout


def test_what_is_ignored_can_be_chosen(artefacts: tuple[Path, Path]) -> None:
    done = start("compare_artefacts.py", *artefacts, "--ignore", "files")
    assert done.returncode == 1, done.stderr
    assert 'DIFFERS  map.json: versions.packager: "0.0" → "0.1"' in done.stdout


def test_keys_tensors_and_files_that_differ_are_named(artefacts: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = artefacts
    identity = json.loads((new / "map.json").read_text())
    identity["anchors"][1]["predicted_nats"] = 1.25
    identity["seed"] = 1
    (new / "map.json").write_text(json.dumps(identity))
    tensors = {"a": np.full(4, 7, np.uint8), "b": np.ones((3, 2), np.float32), "c": np.zeros(1, np.float32)}
    save_file(tensors, new / "store.safetensors", metadata={"order": "other"})
    (new / "skeleton" / "model.onnx").write_bytes(b"another graph")
    (old / "left.txt").touch()
    done = start("compare_artefacts.py", old, new, "--json", tmp_path / "found.json")
    assert done.returncode == 1, done.stderr
    for line in (
        "map.json: anchors.1.predicted_nats: 1.5 → 1.25",
        "map.json: seed: nothing → 1",
        "store.safetensors: a: other bytes, U8[4]",
        "store.safetensors: b: F32[2, 3] → F32[3, 2]",
        f"store.safetensors: c: only in {new / 'store.safetensors'}",
        'store.safetensors: __metadata__.order: nothing → "other"',
        "skeleton/model.onnx: other bytes, 5 → 13",
        f"left.txt: only in {old}",
    ):
        assert f"DIFFERS  {line}\n" in done.stdout
    assert "0 files equal, 8 differences, 2 ignored" in done.stdout
    assert len(json.loads((tmp_path / "found.json").read_text())["differences"]) == 10


def test_the_same_values_in_other_bytes_are_a_difference(artefacts: tuple[Path, Path]) -> None:
    old, new = artefacts
    (new / "map.json").write_text(json.dumps(json.loads((old / "map.json").read_text()), indent=1))
    done = start("compare_artefacts.py", old, new)
    assert done.returncode == 1, done.stderr
    assert "DIFFERS  map.json: the same values, written in another way" in done.stdout


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    done = start("compare_artefacts.py", tmp_path, tmp_path / "none")
    assert done.returncode == 2
    assert "expected the folder of a map or bundle" in done.stderr
