"""Maps, texts and models that are foreign, cut short or degenerate: an error that says so, or a stated way on."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pico, random_model, random_text
from test_cli import names, packager_, succeed
from transformers import PreTrainedTokenizerFast

from packager.scoremap.identity import read_identity
from packager.scoremap.model import read_map

BUILD = ["--profile", "laptop-16gb", "--context", 128, "--no-validate"]
SCORE = ["--tokens", 2048, "--quick"]


@pytest.fixture
def map_copy(maps: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(maps("llama"), tmp_path / "copy.map"))


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    return folder


# Maps


@pytest.mark.parametrize(
    "verb", [["build", *BUILD, "-o", "out.bundle"], ["curve", "--measure", 2]], ids=["build", "curve"]
)
def test_the_store_of_another_map_is_refused(
    verb: list[object], map_copy: Path, maps: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(map_copy.parent)
    shutil.copyfile(maps("taught") / "store.safetensors", map_copy / "store.safetensors")
    done = packager_(verb[0], map_copy, *verb[1:])
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith(f"packager: {map_copy / 'store.safetensors'}")
    assert last.endswith("score the model again")
    # With its digests it is whole, and still not this map's.
    shutil.copyfile(maps("taught") / "store.json", map_copy / "store.json")
    done = packager_(verb[0], map_copy, *verb[1:])
    assert done.code == 1
    assert f"{map_copy / 'store.json'} is not the file that map.json names" in done.err.splitlines()[-1]
    assert names(map_copy.parent) == ["copy.map"]


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.5, 0.999])
def test_a_store_cut_short_makes_no_bundle(map_copy: Path, share: float) -> None:
    store = map_copy / "store.safetensors"
    size = store.stat().st_size
    with store.open("r+b") as file:
        file.truncate(int(size * share))
    done = packager_("build", map_copy, *BUILD, "-o", map_copy.parent / "out.bundle")
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith(
        f"packager: {store} is cut short: tensor "
        if share >= 0.5
        else f"packager: {store} is not a whole safetensors file"
    )
    assert names(map_copy.parent) == ["copy.map"]


def test_a_map_without_its_store_still_plans_and_says_what_it_lacks(map_copy: Path) -> None:
    (map_copy / "store.safetensors").unlink()
    succeed("plan", map_copy, "--profile", "laptop-16gb")
    done = packager_("build", map_copy, *BUILD, "-o", map_copy.parent / "out.bundle")
    assert done.code == 1
    assert (
        done.err.splitlines()[-1]
        == f"packager: {map_copy / 'store.safetensors'} is missing: the map is incomplete, score the model again"
    )


def test_the_map_of_another_model_is_refused_and_kept(
    map_copy: Path, picos: Callable[[str], Pico], calibration_text: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in map_copy.rglob("*")}
    out = map_copy.parent / "out.bundle"
    done = packager_(
        "pack",
        picos("qwen3").folder,
        "--map",
        map_copy,
        "--profile",
        "laptop-16gb",
        "--calibration",
        calibration_text,
        *SCORE,
        "-o",
        out,
    )
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith(f"packager: {map_copy} is the map of another model: pico-llama (sha256 ")
    assert last.endswith("name another map with --map, or remove this one")
    assert {path: path.stat().st_mtime_ns for path in map_copy.rglob("*")} == before
    assert names(map_copy.parent) == ["copy.map"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param(["--tokens", 4096], "(tokens 2048 in place of 4096)", id="tokens"),
        pytest.param(
            ["--seed", 3, "--float-only"],
            "(float_only False in place of True; seed 0 in place of 3)",
            id="two settings",
        ),
        pytest.param(["--calibration", "other.txt"], "(another calibration text, text.txt)", id="another name"),
        pytest.param(["--calibration", "text.txt"], "(another calibration text, text.txt)", id="the same name"),
    ],
)
def test_the_map_of_other_settings_is_kept(
    changes: list[object],
    said: str,
    map_copy: Path,
    picos: Callable[[str], Pico],
    calibration_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert calibration_text.name == "text.txt"
    texts = map_copy.parent / "texts"
    texts.mkdir()
    monkeypatch.chdir(texts)
    for name in ("other.txt", "text.txt"):
        (texts / name).write_text(random_text(3, 6000))
    text = [] if "--calibration" in changes else ["--calibration", calibration_text]
    before = {path: path.stat().st_mtime_ns for path in map_copy.rglob("*")}
    out = map_copy.parent / "out.bundle"
    done = packager_(
        "pack", picos("llama").folder, "--map", map_copy, "--profile", "laptop-16gb", *SCORE, *text, *changes, "-o", out
    )
    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        f"packager: {map_copy} is the map of this model with other settings {said}: keep it and name another with "
        "--map, "
        "or pass --force to score again in its place"
    )
    assert {path: path.stat().st_mtime_ns for path in map_copy.rglob("*")} == before
    assert names(map_copy.parent) == ["copy.map", "texts"]


def test_the_map_of_other_settings_is_replaced_by_force(
    map_copy: Path, picos: Callable[[str], Pico], calibration_text: Path
) -> None:
    out = map_copy.parent / "out.bundle"
    succeed(
        "pack",
        picos("llama").folder,
        "--map",
        map_copy,
        *BUILD,
        "--calibration",
        calibration_text,
        *SCORE,
        "--seed",
        3,
        "--force",
        "-o",
        out,
    )
    assert read_identity(map_copy).settings.seed == 3
    assert names(map_copy.parent) == ["copy.map", "out.bundle"]


# Texts


def noise(characters: int) -> str:
    generator = random.Random(0)
    return "".join(generator.choice("abcdefghijklmnopqrstuvwxyz0123456789      ") for _ in range(characters))


@pytest.mark.parametrize("kind", ["known", "another order of words", "noise"])
def test_a_text_that_the_model_does_not_know_is_warned_of(kind: str, taught: Pico, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.txt"
    path.write_text(
        {"known": random_text(2, 6000), "another order of words": random_text(9, 6000), "noise": noise(12_000)}[kind]
    )
    done = succeed("score", taught.folder, "-o", tmp_path / "out.map", "--calibration", path, *SCORE, "--json")
    loss, per_byte = done.json["identity"]["losses"]["heldout_nats"], done.json["nats_per_byte"]
    assert 0 < per_byte < loss
    warnings = [line for line in done.err.splitlines() if "warning" in line]
    assert warnings == [f"packager: warning: {warning}" for warning in done.json["warnings"]]
    if kind == "known":
        assert warnings == []
    else:
        (warning,) = warnings
        assert (
            f"the model does not know text like {path.name}: its held-out part costs {loss:.4f} nats per token, "
            f"{per_byte:.2f} per byte" in warning
        )
    assert (tmp_path / "out.map" / "map.json").is_file()


def test_scoring_says_its_time_and_its_memory(taught: Pico, calibration_text: Path, tmp_path: Path) -> None:
    command = ["score", taught.folder, "-o", tmp_path / "out.map", "--calibration", calibration_text, *SCORE]
    found = succeed(*command, "--json").json
    phases = ["read", "skeleton", "curvature", "options", "probes", "cache", "write"]
    assert set(found["seconds"]) == set(phases)
    assert all(taken >= 0 for taken in found["seconds"].values())
    assert found["peak_bytes"] > 100 << 20
    lines = [line.split() for line in succeed(*command, "--force").out.splitlines()]
    assert [line[0] for line in lines[2:]] == [*phases, "total", "peak"]
    assert float(lines[-2][1]) == pytest.approx(sum(float(line[1]) for line in lines[2:-2]), abs=0.5)


# Models


def test_inputs_that_never_fire_do_not_stop_scoring(
    tokenizer: PreTrainedTokenizerFast, calibration_text: Path, tmp_path: Path
) -> None:
    """Zero rows in H: a third of one layer's inputs, and all of another's."""
    model = random_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.input_layernorm.weight")[::3] = 0
        model.get_parameter("model.layers.1.post_attention_layernorm.weight").zero_()
    folder = save(model, tokenizer, tmp_path / "dead")
    out = tmp_path / "out.bundle"
    done = succeed(
        "pack",
        folder,
        "--profile",
        "laptop-16gb",
        "--context",
        128,
        "--calibration",
        calibration_text,
        *SCORE,
        "-o",
        out,
        "--json",
    )
    assert done.json["report"]["passed"] is True
    scoremap = read_map(tmp_path / "dead.map")
    for unit, chain in zip(scoremap.units, scoremap.options, strict=True):
        if unit.name in ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"):
            assert [option.loss_nats for option in chain] == [
                0.0
            ]  # what reads nothing costs nothing: only its smallest option is left
        else:
            assert len(chain) > 1 or unit.name == "model.layers.1.mlp.down_proj"  # which reads their product


@pytest.mark.parametrize("value", [1e25, 1e19])
def test_infinite_activations_are_refused(
    value: float, tokenizer: PreTrainedTokenizerFast, calibration_text: Path, tmp_path: Path
) -> None:
    """The weights are finite, what they make is not."""
    model = random_model("llama")
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.get_parameter(f"model.layers.0.mlp.{name}.weight").mul_(value)
    folder = save(model, tokenizer, tmp_path / "huge")
    done = packager_("score", folder, "-o", tmp_path / "out.map", "--calibration", calibration_text, *SCORE)
    assert done.code == 1
    assert "are not finite: the model overflows in float32 or the checkpoint is damaged" in done.err.splitlines()[-1]
    assert not (tmp_path / "out.map").exists()
