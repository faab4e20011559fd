"""`packager curve`: predicted at once, measured on ONNX Runtime, drawn."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import random_text
from test_cli import names, packager_, succeed

from packager.io.files import dump_json
from packager.io.safetensors_ranges import read_header
from packager.planning.plan import plan_file_bytes
from packager.planning.size_curve import evenly
from packager.profile import load_profile
from packager.scoremap.opening import open_map


def test_thirty_sizes_are_predicted_from_the_map_alone(maps: Callable[[str], Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone.map"
    alone.mkdir()
    for file in ("scoremap.safetensors", "map.json"):
        shutil.copyfile(maps("llama") / file, alone / file)
    found = succeed("curve", alone, "--json").json
    assert 20 < len(found["points"]) <= 30  # a model this small has few sizes near float32
    assert found["measurement"] is None
    loaded = open_map(maps("llama"))
    for point in found["points"]:
        assert point["measured"] is None
        assert (
            point["predicted_nats"]
            == plan_file_bytes(loaded, load_profile("laptop-16gb"), point["limit_bytes"]).loss_nats
        )
    text = succeed("curve", alone).out
    assert len(text.splitlines()) == len(found["points"]) + 3
    assert f"{found['points'][7]['file_bytes']:,}" in text


def test_a_device_bounds_peak_memory(maps: Callable[[str], Path]) -> None:
    found = succeed(
        "curve", maps("llama"), "--profile", "edge-box-256mb", "--context", 128, "--sizes", 6, "--json"
    ).json
    assert (found["bounded"], found["profile"], found["context_tokens"]) == ("peak memory", "edge-box-256mb", 128)
    for point in found["points"]:
        plan = succeed(
            "plan",
            maps("llama"),
            "--profile",
            "edge-box-256mb",
            "--context",
            128,
            "--budget",
            point["limit_bytes"] + 20 * 2**20,  # the margin of what is not measured
            "--fill",
            "--json",
        ).json
        assert (plan["file_bytes"], plan["loss_nats"], plan["peak_bytes"]) == (
            point["file_bytes"],
            point["predicted_nats"],
            point["peak_bytes"],
        )


def test_sizes_are_measured_on_the_held_out_windows(maps: Callable[[str], Path], tmp_path: Path) -> None:
    found = succeed("curve", maps("taught"), "--sizes", 12, "--measure", 4, "--json").json
    measured = [point["measured"] for point in found["points"]]
    assert [position for position, item in enumerate(measured) if item] == evenly(4, len(measured))
    least, most = measured[0], measured[-1]
    assert abs(most["rise_nats"]) < 1e-4  # float32, as the source model was in torch
    assert most["step_nats"] is None
    assert least["rise_nats"] > 5 * least["noise_nats"] > 0
    taken = [item for item in measured if item]
    for smaller, larger in itertools.pairwise(taken):
        assert smaller["step_nats"] == pytest.approx(smaller["rise_nats"] - larger["rise_nats"], abs=1e-9)
    assert found["measurement"]["monotone"] is True
    assert found["measurement"]["text"] == "held-out windows of text.txt"
    # The same size, as a build of its own measures it.
    report = succeed(
        "build",
        maps("taught"),
        "--profile",
        "laptop-16gb",
        "--context",
        512,
        "--fill",
        "-o",
        tmp_path / "out.bundle",
        "--json",
    ).json["report"]
    source = next(check["value"] for check in report["checks"] if check["name"] == "held-out loss of the source model")
    assert found["measurement"]["source_nats"] == pytest.approx(source, abs=1e-6)
    assert report["measured"]["loss_nats"] == pytest.approx(most["rise_nats"], abs=1e-4)


def test_sizes_are_measured_on_a_text(maps: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(random_text(2, 1500))
    done = succeed("curve", maps("taught"), "--sizes", 5, "--measure", 3, "--text", path, "--windows", 2)
    assert "measured on ONNX Runtime: mine.txt, 2 windows, 1,022 tokens; source" in done.out
    found = succeed(
        "curve",
        maps("taught"),
        "--sizes",
        5,
        "--text",
        path,
        "--windows",
        2,
        "--profile",
        "edge-box-256mb",
        "--context",
        100,
        "--json",
    ).json
    assert found["measurement"] | {"source_nats": 0} == {
        "text": "mine.txt",
        "windows": 2,
        "tokens": 198,
        "source_nats": 0,
        "monotone": True,
    }
    assert all(
        point["measured"] is not None for point in found["points"]
    )  # eight are asked for where no number is given
    assert found["points"][-1]["measured"]["rise_nats"] == 0.0
    assert names(tmp_path) == ["mine.txt"]


def test_a_curve_that_is_not_monotone_is_a_failed_check(
    maps: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asks of every size that it cost far more than the next larger one.
    monkeypatch.setattr("packager.planning.size_curve.MOST_NOISE", -1e9)
    done = packager_("curve", maps("llama"), "--sizes", 4, "--measure", 2)
    assert done.code == 3
    assert "NOT MONOTONE" in done.out


def test_a_picture_of_each_kind(maps: Callable[[str], Path], tmp_path: Path) -> None:
    command = ["curve", maps("llama"), "--sizes", 8, "-o"]
    succeed("curve", maps("taught"), "--sizes", 8, "-o", tmp_path / "a.png", "--measure", 2)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    succeed(*command, tmp_path / "a.svg", "--json")
    succeed(*command, tmp_path / "b.SVG", "--profile", "laptop-16gb")
    succeed(*command, tmp_path / "c.svg")
    for file in ("a.svg", "b.SVG"):
        assert ElementTree.parse(tmp_path / file).getroot().tag.endswith("svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()
    assert names(tmp_path) == ["a.png", "a.svg", "b.SVG", "c.svg"]


def test_a_picture_needs_matplotlib_and_says_so_first(
    maps: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "a.png"
    done = packager_("curve", maps("llama"), "-o", out, "--measure")
    assert done.code == 2
    assert done.err == (
        f'packager: drawing {out} needs matplotlib, which is not installed: pip install "edge-packager[plot]"\n'
    )
    assert names(tmp_path) == []
    assert packager_("curve", maps("llama")).code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "a.pdf"], 2, "a.pdf: expected a name that ends in .png or .svg"),
        (["--sizes", 1], 2, "argument --sizes: expected a whole number from 2 to 1000, found 1"),
        (["--measure", 1], 2, "argument --measure: expected a whole number from 2 to 1000, found 1"),
        (["--windows", 0, "--text", "x"], 2, "argument --windows: expected a whole number, at least 1, found 0"),
        (["--profile", "toaster"], 1, None),
        (
            ["--profile", "laptop-16gb", "--context", 1025],
            2,
            "context 1025 tokens: expected at least 33 and at most 1024, the model's own",
        ),
        (["--text", "missing.txt"], 1, "text missing.txt does not exist"),
    ],
)
def test_what_cannot_be_asked_for(
    arguments: list[object], code: int, message: str | None, maps: Callable[[str], Path]
) -> None:
    done = packager_("curve", maps("llama"), *arguments)
    assert done.code == code
    said = done.err.splitlines()[-1]
    # What is wrong by itself comes after how the verb is called.
    assert done.err == f"{said}\n" or done.err.startswith("usage: packager curve ")
    assert message is None or said == f"packager: {message}"


def test_a_text_too_short_and_a_device_too_small(maps: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A few words.")
    done = packager_("curve", maps("llama"), "--text", path)
    assert (done.code, done.err) == (
        1,
        f"packager: text {path} is too short: expected at least one window of 512 tokens\n",
    )
    small = tmp_path / "small.toml"
    small.write_text(
        '[device]\ndescription = "too small"\nmemory = "64MiB"\nbudget = '
        '"50%"\n\n[runtime]\n\n[context]\ntokens = 512\n'
    )
    done = packager_("curve", maps("llama"), "--profile", small, "--json")
    assert done.code == 4
    assert done.json["budget_bytes"] == 64 << 20


def test_a_damaged_store_stops_a_measurement(maps: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(maps("llama"), tmp_path / "copy.map"))
    position = next(
        tensor.region.offset for key, tensor in read_header(folder / "store.safetensors")[0].items() if "|f32|" in key
    )
    with (folder / "store.safetensors").open("r+b") as file:
        file.seek(position)
        file.write(b"\x01\x02\x03\x04")
    done = packager_("curve", folder, "--measure", 2)
    assert done.code == 1
    assert "the store is damaged, score the model again" in done.err.splitlines()[-1]
    assert dump_json(succeed("curve", folder, "--json").json)
