"""Other ways to score, from a model to a valid bundle: without low-bit kernels, and by ACIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pico, make_tokenizer, random_model
from test_cli import Stop, least_budget, names, packager_, profile, succeed  # noqa: F401  the fixture `profile` is used by name

from packager.bundle.folder import GRAPH_FILE
from packager.bundle.opening import open_bundle
from packager.cli.progress_bars import Bars
from packager.forms.floats import FloatForm
from packager.forms.low_rank import LowRankForm
from packager.forms.pivot import PivotForm
from packager.forms.registry import parse_form
from packager.profile import profile_folder
from packager.runtime.sessions import full_logits_session, run_window
from packager.scoremap.model import read_map
from packager.scoring.losses import token_losses
from packager.validation.reference import load_reference

ACIP = [
    "--method",
    "acip",
    "--acip-steps",
    24,
    "--acip-tokens",
    96,
    "--acip-tuning",
    4,
    "--acip-rank",
    2,
    "--acip-rate",
    5e-4,
]


@pytest.fixture(scope="session")
def low_rank_profile(tmp_path_factory: pytest.TempPathFactory, profile: Path) -> Path:  # noqa: F811
    """Where nodes weigh nothing: those that factors add outweigh what they save of a pico model."""
    path = tmp_path_factory.mktemp("profiles") / "pico-factors.toml"
    path.write_text(profile.read_text() + "session_bytes_per_node = 0\n")
    return path


@pytest.fixture(scope="session")
def float_profile(tmp_path_factory: pytest.TempPathFactory, low_rank_profile: Path) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "pico-float.toml"
    path.write_text(low_rank_profile.read_text().replace("[runtime]\n", "[runtime]\nbits = []\n"))
    return path


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are wide enough for factors in blocks of 32."""
    folder = tmp_path_factory.mktemp("wide") / "pico-wide"
    model: Any = random_model("llama", hidden_size=128, intermediate_size=256, num_attention_heads=8)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def built_at_half(folder: Path, device: Path, out: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Build and validate a bundle half-way between the map's smallest and its largest. Returns its forms and report."""
    chains = read_map(folder).options
    return built(folder, device, out, sum(chain[0].bytes - chain[-1].bytes for chain in chains) // 2)


def built(folder: Path, device: Path, out: Path, more: int = 0) -> tuple[dict[str, str], dict[str, Any]]:
    """Build and validate a bundle `more` bytes larger than the map's smallest. Returns its forms and report."""
    # In two verbs: a build that validates would use the memory that the profile's processes are said to take and do
    # not.
    done = succeed(
        "build",
        folder,
        "--profile",
        device,
        "--budget",
        least_budget(folder, device) + more,
        "-o",
        out,
        "--json",
        "--no-validate",
    )
    report = succeed("validate", out, "--json").json
    assert report["passed"] is True
    return done.json["plan"]["choices"], report


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_device_without_low_bit_kernels_gets_low_rank(
    name: str, picos: Callable[[str], Pico], calibration_text: Path, float_profile: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "float.map"
    succeed(
        "score",
        picos(name).folder,
        "-o",
        folder,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
        "--float-only",
    )
    forms = [option.form for chain in read_map(folder).options for option in chain]
    assert {type(form) for form in forms} == {FloatForm, PivotForm}
    assert all(isinstance(form, FloatForm) or form.factors == FloatForm(label="f32") for form in forms)  # type: ignore[union-attr]
    choices, report = built_at_half(folder, float_profile, tmp_path / "out.bundle")
    assert any(label.startswith("p") for label in choices.values())
    assert abs(report["measured"]["heldout_nats"] - report["measured"]["torch_heldout_nats"]) < 1e-3, (
        "float kernels do not round"
    )


def test_pack_scores_for_the_kernels_of_the_profile(
    picos: Callable[[str], Pico], calibration_text: Path, float_profile: Path, tmp_path: Path
) -> None:
    arguments = [
        "pack",
        picos("llama").folder,
        "--profile",
        float_profile,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
    ]
    succeed(*arguments, "-o", tmp_path / "out.bundle", "--no-validate")
    identity = json.loads((tmp_path / "pico-llama.map" / "map.json").read_text())
    assert identity["settings"]["float_only"] is True


@pytest.mark.parametrize("provider", ["dml", "cuda"])
def test_an_accelerator_of_float16_alone_gets_low_rank_in_float16(
    provider: str, wide: Path, calibration_text: Path, tmp_path: Path
) -> None:
    """The graph is the accelerator's; what it computes is checked here, where the runtime puts casts around what it has
    no kernels for."""
    device, folder, out = tmp_path / "float16.toml", tmp_path / "float16.map", tmp_path / "out.bundle"
    text = (
        (profile_folder() / "float16-accelerator.toml")
        .read_text()
        .replace('"dml"', f'"{provider}"')
        .replace("tokens = 2048", "tokens = 512")
    )
    device.write_text(text + "session_bytes_per_node = 0\n")
    score = [
        "score",
        wide,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
        "--float-only",
        "--provider",
        provider,
    ]
    succeed(*score, "-o", folder)
    budget = least_budget(folder, device) + 100_000
    plan = succeed("build", folder, "--profile", device, "--budget", budget, "-o", out, "--no-validate", "--json").json[
        "plan"
    ]
    assert {label.rpartition(".")[2] for label in plan["choices"].values()} == {"f16"}
    assert any(label.startswith("p") for label in plan["choices"].values())
    bundle = open_bundle(out)
    torch_side, window = load_reference(bundle), torch.from_numpy(bundle.folder.reference.held_out().windows[0])
    expected, _ = token_losses(torch_side.model, window)
    found = run_window(full_logits_session(out / GRAPH_FILE, threads=1), window.numpy())
    # Float16 carries eleven bits; the model's own spread is what an error is held against.
    assert np.abs(found.astype(np.float32) - expected.numpy()).max() < 0.05 * float(expected.std())


def test_acip_from_model_to_valid_bundle(
    picos: Callable[[str], Pico], calibration_text: Path, float_profile: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "acip.map"
    command = [
        "score",
        picos("llama").folder,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
        *ACIP,
        "--float-only",
    ]
    succeed(*command, "-o", folder)
    assert json.loads((folder / "map.json").read_text())["settings"]["acip"]["adapter_rank"] == 2
    choices, report = built_at_half(folder, float_profile, tmp_path / "out.bundle")
    assert any(isinstance(parse_form(label), LowRankForm) for label in choices.values())
    assert abs(report["measured"]["heldout_nats"] - report["measured"]["torch_heldout_nats"]) < 1e-3


def test_acip_with_low_bit_factors(wide: Path, calibration_text: Path, low_rank_profile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "acip.map"
    succeed("score", wide, "--calibration", calibration_text, "--tokens", 2048, "--quick", *ACIP, "-o", folder)
    labels = {option.form.label for chain in read_map(folder).options for option in chain}
    assert any(label.startswith("r") and label.endswith(".q4g32z") for label in labels)
    choices, _ = built(folder, low_rank_profile, tmp_path / "out.bundle")
    assert any(label.startswith("r") for label in choices.values())


def test_pivots_with_low_bit_factors(
    wide: Path, calibration_text: Path, low_rank_profile: Path, tmp_path: Path
) -> None:
    """The whole ladder of the curvature method: what the hulls keep is built at the smallest size."""
    folder = tmp_path / "full.map"
    succeed("score", wide, "--calibration", calibration_text, "--tokens", 2048, "-o", folder)
    assert any(isinstance(option.form, PivotForm) for chain in read_map(folder).options for option in chain)
    choices, _ = built(folder, low_rank_profile, tmp_path / "out.bundle")
    assert any(label.startswith("p") for label in choices.values())


@pytest.mark.parametrize("moment", [5, 9, 30, 45])
def test_acip_goes_on_after_ctrl_c(
    picos: Callable[[str], Pico], calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    command = [
        "score",
        picos("llama").folder,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
        *ACIP,
        "--float-only",
        "-o",
    ]
    stop = Stop(moment, KeyboardInterrupt())
    with monkeypatch.context() as patch:
        patch.setattr("packager.scoring.acip.training._SAVE_SECONDS", 0.0)
        patch.setattr(Bars, "phase", stop)
        patch.setattr(Bars, "advance", stop)
        assert packager_(*command, tmp_path / "one.map").code == 130
    assert stop.left == 0
    assert not (tmp_path / "one.map").exists()
    succeed(*command, tmp_path / "one.map")
    succeed(*command, tmp_path / "two.map")
    assert names(tmp_path) == ["one.map", "two.map"]
    assert (tmp_path / "one.map" / "store.safetensors").read_bytes() == (
        tmp_path / "two.map" / "store.safetensors"
    ).read_bytes()
    assert read_map(tmp_path / "one.map") == read_map(tmp_path / "two.map")


def test_an_unreachable_stop_ratio_is_said_before_anything_is_computed(
    picos: Callable[[str], Pico], calibration_text: Path, tmp_path: Path
) -> None:
    done = packager_(
        "score",
        picos("llama").folder,
        "--calibration",
        calibration_text,
        "--method",
        "acip",
        "--acip-stop",
        0.3,
        "-o",
        tmp_path / "x.map",
        "--json",
    )
    assert done.code == 2
    assert "adapters of rank 32 alone keep 0.881 of the layers' elements" in done.json["message"]


def test_settings_of_acip_need_acip(picos: Callable[[str], Pico], tmp_path: Path) -> None:
    done = packager_("score", picos("llama").folder, "--acip-steps", 10, "-o", tmp_path / "x.map")
    assert (done.code, done.err) == (
        2,
        "packager: ACIP's settings are of another method: ask for the method acip (--method acip), or leave them out\n",
    )
