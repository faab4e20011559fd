"""The command line from a model to a bundle and back, with pico models."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from conftest import Pico
from safetensors.numpy import load_file, save_file

import packager.graph.surgery
import packager.io.files
import packager.io.safetensors_ranges
from packager.cli.command import main
from packager.cli.progress_bars import Bars
from packager.io.safetensors_ranges import read_header
from packager.runtime.limits import run_limited
from packager.scoremap.model import read_map

PROFILE = """\
[device]
description = "room for a pico model, whatever the process needs on this machine"
memory = "1GiB"
budget = "50%"
threads = 1

[runtime]
chunk_tokens = 32

[context]
tokens = 512

[memory]
margin_bytes = 0
process_bytes = 134217728
process_load_bytes = 134217728
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def packager_(*arguments: object) -> Done:
    """Run one command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
    return Done(code=code, out=out.getvalue(), err=err.getvalue())


def succeed(*arguments: object) -> Done:
    done = packager_(*arguments)
    assert done.code == 0, f"{arguments}: {done.code}\n{done.out[-3000:]}\n{done.err[-3000:]}"
    return done


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "pico-box.toml"
    path.write_text(PROFILE)
    return path


def least_budget(folder: Path, profile: Path, *context: object) -> int:
    """The least budget that a map fits, as an infeasible plan says it."""
    done = packager_("plan", folder, "--profile", profile, "--budget", "1MiB", "--json", *context)
    assert done.code == 4
    return int(done.json["minimum_bytes"])


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, maps: Callable[[str], Path], profile: Path) -> Path:
    """A bundle of the LLaMA at about half its choices, not validated. Tests must not write into it."""
    out = tmp_path_factory.mktemp("bundles") / "llama.bundle"
    budget = least_budget(maps("llama"), profile) + 40_000
    succeed("build", maps("llama"), "--profile", profile, "--budget", budget, "-o", out, "--no-validate")
    return out


@pytest.fixture
def bundle_copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.bundle"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The way through


def test_every_architecture_from_model_to_valid_bundle(
    pico: Pico, maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    folder, out = maps(pico.name), tmp_path / "out.bundle"
    budget = least_budget(folder, profile) + 40_000
    plan = succeed("plan", folder, "--profile", profile, "--budget", budget, "--json").json
    assert plan["peak_bytes"] <= budget
    assert 0 < plan["prefix"] <= plan["moves"]
    assert any(label.startswith("q") for label in plan["choices"].values())
    succeed("build", folder, "--profile", profile, "--budget", budget, "-o", out, "--no-validate")
    report = packager_("validate", out, "--json")
    assert report.code == 0, report.out + report.err
    checks = {check["name"]: check for check in report.json["checks"]}
    assert all(check["passed"] is not False for check in checks.values())
    assert abs(report.json["measured"]["heldout_nats"] - report.json["measured"]["torch_heldout_nats"]) < 0.05


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_build_is_validated_and_says_so(
    name: str, maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.bundle"
    done = succeed("build", maps(name), "--profile", profile, "-o", out, "--json")
    assert done.json["report"]["passed"] is True
    assert names(tmp_path) == ["out.bundle"]
    assert {"report.json", "report.html", "golden.safetensors", "check.py", "SHA256SUMS", "packager.json"} <= set(
        names(out)
    )
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, _, file = line.partition("  ")
        assert packager.io.files.sha256_file(out / file) == digest
    assert succeed("validate", out, "--json").json["passed"] is True


@pytest.mark.parametrize("context", [48, 128])
def test_a_context_shorter_than_a_calibration_window(
    context: int, maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.bundle"
    done = succeed("build", maps("llama"), "--profile", profile, "--context", context, "-o", out, "--json")
    assert done.json["report"]["passed"] is True
    assert json.loads((out / "genai_config.json").read_text())["search"]["max_length"] == context


@pytest.mark.parametrize("context", [48, 40, 49, 80])
def test_a_sliding_window_about_as_long_as_the_context(
    context: int, maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.bundle"
    done = succeed(
        "build", maps("mistral"), "--profile", profile, "--context", context, "-o", out, "--json"
    )  # its window is 48
    assert done.json["report"]["passed"] is True


def test_pack_does_it_all_and_keeps_its_map(
    picos: Callable[[str], Pico], calibration_text: Path, profile: Path, tmp_path: Path
) -> None:
    arguments = [
        "pack",
        picos("llama").folder,
        "--profile",
        profile,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
    ]
    first = succeed(*arguments, "-o", tmp_path / "one.bundle", "--json")
    assert first.json["report"]["passed"] is True
    assert names(tmp_path) == ["one.bundle", "pico-llama.map"]
    written = (tmp_path / "pico-llama.map" / "map.json").stat().st_mtime_ns
    second = succeed(*arguments, "-o", tmp_path / "two.bundle", "--json", "--no-validate")
    assert (tmp_path / "pico-llama.map" / "map.json").stat().st_mtime_ns == written
    assert second.json["plan"] == first.json["plan"]


def test_inspect_says_what_lies_there(maps: Callable[[str], Path], bundle: Path) -> None:
    described = succeed("inspect", maps("llama"), "--json").json
    assert (described["kind"], described["units"]) == ("score map", 15)
    assert described["model"]["architecture"] == "LlamaForCausalLM"
    described = succeed("inspect", bundle, "--json").json
    assert (described["kind"], described["profile"]) == ("bundle", "pico-box")
    assert succeed("inspect", bundle / "plan.json", "--json").json["kind"] == "plan"
    assert "llama" in succeed("inspect", bundle).out


def test_run_speaks(bundle: Path) -> None:
    texts = []
    for prompt in ("The first people", "water", "A long day", "see number"):  # a random model may end at once
        done = succeed("run", bundle, "--prompt", prompt, "--tokens", 8, "--json", "--raw")
        assert done.json["prompt"] == prompt
        assert 1 <= done.json["tokens"] <= 8
        assert done.json["tokens_per_second"] > 0
        assert succeed("run", bundle, "--prompt", prompt, "--tokens", 8, "--raw").out == done.json["text"] + "\n"
        texts.append(done.json["text"])
    assert any(text.strip() for text in texts)
    succeed("run", bundle, "--prompt", "The first people", "--tokens", 8)


def test_run_refuses_a_prompt_longer_than_the_context(bundle: Path) -> None:
    done = packager_("run", bundle, "--prompt", "word " * 600)
    assert done.code == 1
    assert "the bundle's context is 512: shorten the prompt or pack with a longer --context" in done.err


def test_the_device_check_runs_by_itself(bundle_copy: Path) -> None:
    succeed("validate", bundle_copy)
    done = subprocess.run([sys.executable, "-I", bundle_copy / "check.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    with (bundle_copy / "onnx" / "model_q4.onnx_data").open("r+b") as file:
        file.write(b"\x01")
    done = subprocess.run([sys.executable, "-I", bundle_copy / "check.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 3


# The same inputs give the same bytes


def test_plans_are_the_same_bytes(maps: Callable[[str], Path], profile: Path, tmp_path: Path) -> None:
    budget = least_budget(maps("llama"), profile) + 40_000
    for name in ("one.json", "two.json"):
        succeed("plan", maps("llama"), "--profile", profile, "--budget", budget, "-o", tmp_path / name)
    moved = shutil.copytree(maps("llama"), tmp_path / "elsewhere.map")
    succeed("plan", moved, "--profile", profile, "--budget", budget, "-o", tmp_path / "three.json")
    content = (tmp_path / "one.json").read_bytes()
    assert content == (tmp_path / "two.json").read_bytes() == (tmp_path / "three.json").read_bytes()


def test_scores_and_bundles_are_the_same_bytes(
    picos: Callable[[str], Pico], maps: Callable[[str], Path], calibration_text: Path, profile: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.map"
    succeed("score", picos("llama").folder, "-o", again, "--calibration", calibration_text, "--tokens", 2048, "--quick")
    files = {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert files == {path.relative_to(maps("llama")) for path in maps("llama").rglob("*") if path.is_file()}
    # The map's own file is test_scoremap's; map.json holds its hash.
    files -= {Path("scoremap.safetensors"), Path("map.json")}
    assert [name for name in sorted(files) if (again / name).read_bytes() != (maps("llama") / name).read_bytes()] == []
    assert read_map(again) == read_map(maps("llama"))
    for name in ("one", "two"):
        succeed("build", again, "--profile", profile, "-o", tmp_path / name, "--no-validate")
    built = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert [
        name
        for name in sorted(built)
        if (tmp_path / "one" / name).read_bytes() != (tmp_path / "two" / name).read_bytes()
    ] == []


# Exit codes


def test_a_size_that_is_none_is_a_usage_error(maps: Callable[[str], Path], profile: Path) -> None:
    done = packager_("plan", maps("llama"), "--profile", profile, "--budget", "12 parsecs")
    assert done.code == 2
    assert done.err == (
        "packager: '12 parsecs' is not a size: expected bytes, a unit such as 700MB or 1.5GiB, or a share such as 60%\n"
    )


@pytest.mark.parametrize(
    "arguments", [["plan"], ["frobnicate"], [], ["plan", "x", "--profile", "y", "--context", "many"]]
)
def test_argparse_errors_are_usage_errors(arguments: list[str]) -> None:
    assert packager_(*arguments).code == 2


def test_an_infeasible_budget_is_4_and_says_the_minimum(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    for verb, extra in (("plan", []), ("build", ["-o", tmp_path / "out.bundle"])):
        done = packager_(verb, maps("llama"), "--profile", profile, "--budget", "100MiB", "--json", *extra)
        assert done.code == 4
        assert done.json["error"] == "InfeasibleBudgetError"
        assert done.json["budget_bytes"] == 100 * 2**20
        assert done.json["minimum_bytes"] > 128 * 2**20
        assert names(tmp_path) == []
    minimum = done.json["minimum_bytes"]
    assert packager_("plan", maps("llama"), "--profile", profile, "--budget", minimum).code == 0
    assert packager_("plan", maps("llama"), "--profile", profile, "--budget", minimum - 1).code == 4


def test_what_would_fit_is_said_and_fits(maps: Callable[[str], Path], profile: Path) -> None:
    long = least_budget(maps("llama"), profile, "--context", 1024)
    command = ["plan", maps("llama"), "--profile", profile, "--budget", long - 50_000]
    done = packager_(*command, "--context", 1024)
    assert done.code == 4
    assert "what would fit:" in done.err
    found = next(line.split()[1] for line in done.err.splitlines() if line.startswith("  --context "))
    assert packager_(*command, "--context", found).code == 0
    assert packager_(*command, "--context", int(found) + 1).code == 4
    detail = packager_(*command, "--context", 1024, "--json").json["shortfall"]
    assert sum(term["beyond_bytes"] for term in detail["terms"]) == 50_000


@pytest.mark.parametrize("size", ["1100MB", "1.5GiB", "2GB", 2**30 + 1])
def test_a_budget_above_the_device_s_memory_is_a_usage_error(
    maps: Callable[[str], Path], profile: Path, size: object
) -> None:
    done = packager_("plan", maps("llama"), "--profile", profile, "--budget", size)
    assert done.code == 2
    assert done.err.endswith(" is more than the 1.0 GiB that pico-box has\n")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [
        ("600MB", 600_000_000),
        ("600 MiB", 600 * 2**20),
        ("1GB", 10**9),
        ("0.75GiB", 3 * 2**28),
        ("60%", 2**30 * 6 // 10),
    ],
)
def test_sizes_of_a_budget(maps: Callable[[str], Path], profile: Path, size: str, bytes_: int) -> None:
    assert (
        succeed("plan", maps("llama"), "--profile", profile, "--budget", size, "--json").json["budget_bytes"] == bytes_
    )


def test_context_auto_offers_a_frontier_and_builds_its_first(maps: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    path.write_text(PROFILE.replace("tokens = 512", "tokens = 512\nminimum = 128"))
    auto = [
        "--profile",
        path,
        "--context",
        "auto",
        "--budget",
        least_budget(maps("llama"), path, "--context", 128) + 60_000,
    ]
    done = succeed("plan", maps("llama"), *auto, "--json", "-o", tmp_path / "plan.json").json
    frontier = done["frontier"]
    assert len(frontier) > 2
    assert {key: done[key] for key in frontier[0]} == frontier[0]
    assert done["context_tokens"] == 128
    text = succeed("plan", maps("llama"), *auto).out.splitlines()
    assert [line.split()[0] for line in text[-len(frontier) :]] == [str(row["context_tokens"]) for row in frontier]
    assert [line.endswith("  taken") for line in text[-len(frontier) :]] == [True] + [False] * (len(frontier) - 1)
    built = succeed("build", maps("llama"), *auto, "-o", tmp_path / "out.bundle", "--no-validate", "--json").json
    assert (
        built["plan"]
        == {key: value for key, value in done.items() if key != "frontier"}
        == json.loads((tmp_path / "plan.json").read_text())
    )


@pytest.mark.parametrize("context", [1025, 10**9])
def test_a_context_the_model_does_not_have_is_a_usage_error(
    maps: Callable[[str], Path], profile: Path, context: int
) -> None:
    done = packager_("plan", maps("llama"), "--profile", profile, "--context", context)
    assert done.code == 2
    assert done.err == f"packager: context {context} tokens: expected at least 33 and at most 1024, the model's own\n"


def test_an_existing_target_needs_force(
    picos: Callable[[str], Pico], maps: Callable[[str], Path], calibration_text: Path, profile: Path, tmp_path: Path
) -> None:
    bundle, folder = tmp_path / "out.bundle", tmp_path / "out.map"
    build = ["build", maps("llama"), "--profile", profile, "-o", bundle, "--no-validate"]
    score = [
        "score",
        picos("llama").folder,
        "-o",
        folder,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
    ]
    for command, target in ((build, bundle), (score, folder)):
        succeed(*command)
        before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
        done = packager_(*command)
        assert done.code == 1
        assert (
            done.err.splitlines()[-1]
            == f"packager: {target} exists already: choose another name, or pass --force to replace it"
        )
        assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
        succeed(*command, "--force")
    assert names(tmp_path) == ["out.bundle", "out.map"]


@pytest.mark.parametrize("verb", ["plan", "inspect", "validate", "run"])
def test_a_folder_that_is_no_artefact(verb: str, profile: Path, tmp_path: Path) -> None:
    extra = {"plan": ["--profile", profile], "run": ["--prompt", "x"]}.get(verb, [])
    for path in (tmp_path, tmp_path / "missing"):
        done = packager_(verb, path, *extra)
        assert done.code == 1
        said = f"packager: {path} is n" if path.exists() else "packager: there is no "
        assert done.err.startswith(said)
        assert done.err.count("\n") == 1


def test_a_model_that_is_none(tmp_path: Path) -> None:
    done = packager_("score", tmp_path / "missing", "-o", tmp_path / "out.map", "--json")
    assert done.code == 1
    assert done.json["error"] == "ModelError"
    assert names(tmp_path) == []


# Damage


def damage(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset % len(content)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("verb", ["validate", "run", "inspect"])
@pytest.mark.parametrize(
    "file",
    [
        "onnx/model_q4.onnx_data",
        "onnx/model_q4.onnx",
        "tokenizer.json",
        "genai_config.json",
        "reference.safetensors",
        "check.py",
    ],
)
def test_one_changed_byte_is_found(bundle_copy: Path, file: str, verb: str) -> None:
    damage(bundle_copy / file, (bundle_copy / file).stat().st_size // 2)
    done = packager_(verb, bundle_copy, *(["--prompt", "x"] if verb == "run" else []))
    assert done.code == 1
    assert done.err.startswith(f"packager: {bundle_copy / file} is not the file its manifest names")
    assert done.err.count("\n") == 1


def test_a_missing_file_is_found(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").unlink()
    done = packager_("validate", bundle_copy)
    assert (done.code, done.err) == (
        1,
        f"packager: {bundle_copy / 'tokenizer.json'} is missing: the bundle is incomplete, build it again\n",
    )


def linked(folder: Path, blobs: Path) -> None:
    """Make a bundle what it is in a model hub's cache: links to files that are named after their hash."""
    blobs.mkdir()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = blobs / packager.io.files.sha256_file(path)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))


def test_a_bundle_of_links_as_in_a_hubs_cache_is_one(bundle_copy: Path, tmp_path: Path) -> None:
    linked(bundle_copy, tmp_path / "blobs")
    (tmp_path / "blobs" / "attributes").write_text("*.onnx_data filter=lfs")
    (bundle_copy / ".gitattributes").symlink_to(tmp_path / "blobs" / "attributes")
    assert succeed("run", bundle_copy, "--prompt", "the", "--tokens", 2).out
    done = subprocess.run([sys.executable, "-I", bundle_copy / "check.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (bundle_copy / "onnx" / "extra.json").symlink_to(tmp_path / "blobs" / "nowhere")
    done = packager_("run", bundle_copy, "--prompt", "the")
    assert done.code == 1
    assert "extra.json is a symbolic link, and not one of the files that" in done.err


@pytest.mark.parametrize("to", ["other bytes", "nothing", "a folder"])
def test_a_link_to_anything_but_the_very_bytes_is_refused(bundle_copy: Path, tmp_path: Path, to: str) -> None:
    name = "onnx" if to == "a folder" else "tokenizer.json"
    moved = (bundle_copy / name).rename(tmp_path / "moved")
    (bundle_copy / name).symlink_to(moved)
    if to == "other bytes":
        moved.write_bytes(moved.read_bytes().replace(b"a", b"b", 1))
    elif to == "nothing":
        moved.unlink()
    done = packager_("run", bundle_copy, "--prompt", "the")
    assert done.code == 1
    why = "is not the file its manifest names" if to == "other bytes" else "is a symbolic link"
    assert why in done.err
    assert done.err.count("\n") == 1


def edited(change: Callable[[Any], None], path: Path) -> None:
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


def write_json(path: Path, value: Any) -> None:
    path.write_text(packager.io.files.dump_json(value))


def resign(bundle: Path) -> None:
    """Make the hashes of a changed manifest right again, as someone who changes it on purpose would."""
    path = bundle / "packager.json"
    manifest = json.loads(path.read_text())
    listed = {}
    if "files" in manifest:
        manifest["bundle_sha256"] = packager.io.files.sha256_json(manifest["files"])
        files = manifest["files"] if isinstance(manifest["files"], list) else []
        listed = {entry["path"]: entry["sha256"] for entry in files if isinstance(entry, dict)}
    write_json(path, manifest)
    listed["packager.json"] = packager.io.files.sha256_file(path)
    (bundle / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in listed.items()))


MALFORMED: dict[str, Callable[[Any], None]] = {
    "no files": lambda manifest: manifest.pop("files"),
    "files a number": lambda manifest: manifest.update(files=3),
    "a file a number": lambda manifest: manifest.update(files=[3]),
    "a path outside": lambda manifest: manifest["files"][0].update(path="../x"),
    "a path a number": lambda manifest: manifest["files"][0].update(path=3),
    "a size a text": lambda manifest: manifest["files"][0].update(bytes="3"),
    "no graph": lambda manifest: manifest.update(
        files=[entry for entry in manifest["files"] if entry["role"] != "graph"]
    ),
    "no files at all": lambda manifest: manifest.update(files=[]),
    "another schema": lambda manifest: manifest.update(schema=99),
    "no bounds": lambda manifest: manifest.pop("bounds"),
    "a budget a text": lambda manifest: manifest["bounds"].update(budget_bytes="much"),
    "an unknown provider": lambda manifest: manifest["bounds"].update(provider="abacus"),
    "no units": lambda manifest: manifest.pop("units"),
    "a unit short": lambda manifest: manifest["units"].pop(),
    "an unknown form": lambda manifest: manifest["units"][0].update(form="q9g9"),
    "other rows": lambda manifest: manifest["units"][0].update(rows=3),
    "no prediction": lambda manifest: manifest.pop("predicted"),
    "an unknown key": lambda manifest: manifest.update(surprise=1),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_manifest_is_refused_in_one_line(bundle_copy: Path, kind: str) -> None:
    """Also where every hash is right."""
    edited(MALFORMED[kind], bundle_copy / "packager.json")
    resign(bundle_copy)
    done = packager_("validate", bundle_copy)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("packager: ")
    assert str(bundle_copy) in done.err


def test_a_file_taken_out_of_the_manifest_is_found(bundle_copy: Path) -> None:
    edited(lambda manifest: manifest["files"].pop(), bundle_copy / "packager.json")
    done = packager_("validate", bundle_copy)
    assert done.code == 1
    assert done.err.startswith(f"packager: {bundle_copy}")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.2, 0.3, 0.6, 0.9])
def test_a_map_with_one_changed_byte_makes_no_plan(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path, share: float
) -> None:
    folder = shutil.copytree(maps("llama"), tmp_path / "copy.map")
    file = folder / "scoremap.safetensors"
    damage(file, int(file.stat().st_size * share))
    done = packager_("plan", folder, "--profile", profile)
    assert done.code == 1
    assert done.err.startswith("packager: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "file", ["store.safetensors", "reference.safetensors", "skeleton/cpu/graph.onnx", "model/tokenizer.json"]
)
def test_a_map_with_a_changed_file_makes_no_bundle(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path, file: str
) -> None:
    folder = shutil.copytree(maps("llama"), tmp_path / "copy.map")
    position = -5
    if file == "store.safetensors":
        # The budget is ample and to be used: every unit stays float. Bytes that are not copied are not read.
        position = next(tensor.region.offset for key, tensor in read_header(folder / file)[0].items() if "|f32|" in key)
    damage(folder / file, position)
    done = packager_("build", folder, "--profile", profile, "--fill", "-o", tmp_path / "out.bundle", "--no-validate")
    assert done.code == 1
    assert names(tmp_path) == ["copy.map"]


@pytest.mark.parametrize("key", ["model", "geometry", "losses", "files", "calibration"])
def test_a_map_whose_identity_lacks_something_is_refused(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path, key: str
) -> None:
    folder = shutil.copytree(maps("llama"), tmp_path / "copy.map")
    edited(lambda identity: identity.pop(key), folder / "map.json")
    done = packager_("build", folder, "--profile", profile, "-o", tmp_path / "out.bundle", "--no-validate")
    assert done.code == 1
    assert done.err.startswith(f"packager: {folder / 'map.json'}")


def test_a_map_of_a_later_version_is_refused(maps: Callable[[str], Path], profile: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(maps("llama"), tmp_path / "copy.map")
    edited(lambda identity: identity.update(schema=99), folder / "map.json")
    done = packager_("plan", folder, "--profile", profile)
    assert (done.code, done.err) == (
        1,
        f"packager: {folder / 'map.json'} has schema 99, this version reads 2: score the model again\n",
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say what a process has mapped")
def test_the_reference_holds_on_to_no_file_of_the_bundle(bundle_copy: Path) -> None:
    """A bundle may be large: once its weights are made into the reference, its file is let go of."""
    from packager.bundle.opening import open_bundle
    from packager.validation.reference import load_reference

    held = load_reference(open_bundle(bundle_copy))
    assert all(parameter.numel() for parameter in held.model.parameters())
    assert str(bundle_copy) not in Path("/proc/self/maps").read_text()


def test_wrong_weights_fail_validation(bundle_copy: Path) -> None:
    """Weights that are hashed as they are but are not what the reference was made of: the golden file must catch it."""
    succeed("validate", bundle_copy)
    golden = bundle_copy / "golden.safetensors"
    if not golden.is_file():
        # A bundle built without validation has no golden file of its own: give it one of other logits.
        from packager.bundle.opening import open_bundle
        from packager.validation.reference import load_reference, write_golden

        opened = open_bundle(bundle_copy)
        write_golden(load_reference(opened), opened, golden)
    tensors = load_file(golden)
    for name in list(tensors):
        if name.endswith(".logits"):
            tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, golden)

    def admit(manifest: Any) -> None:
        entry = {
            "path": "golden.safetensors",
            "role": "golden",
            "bytes": golden.stat().st_size,
            "sha256": packager.io.files.sha256_file(golden),
        }
        manifest["files"] = [item for item in manifest["files"] if item["path"] != "golden.safetensors"] + [entry]

    edited(admit, bundle_copy / "packager.json")
    resign(bundle_copy)
    done = packager_("validate", bundle_copy, "--json")
    assert done.code == 3, done.err
    failed = [check["name"] for check in done.json["checks"] if check["passed"] is False]
    assert failed == [
        "KL divergence of the next-token distribution from PyTorch, worst prompt",
        "divergence at the end of a full context",
    ]


# A limit, and a runtime that fails


def with_budget(bundle: Path, budget: int) -> Path:
    plan = bundle / "plan.json"
    edited(lambda plan: plan.update(budget_bytes=budget), plan)

    def admit(manifest: Any) -> None:
        manifest["bounds"].update(budget_bytes=budget)
        manifest["plan_sha256"] = packager.io.files.sha256_file(plan)
        for entry in manifest["files"]:
            if entry["path"] == "plan.json":
                entry.update(bytes=plan.stat().st_size, sha256=manifest["plan_sha256"])

    edited(admit, bundle / "packager.json")
    resign(bundle)
    return bundle


def acceptance(done: Done) -> Any:
    return next(check for check in done.json["checks"] if check["name"] == "acceptance test on ONNX Runtime GenAI")


def test_without_cgroups_the_limit_is_not_enforced_and_the_report_says_so(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("packager.runtime.limits._ROOT", tmp_path / "nowhere")
    monkeypatch.setattr("shutil.which", lambda name: None)
    done = succeed("validate", bundle_copy, "--json")
    assert done.json["enforced_by"] is None
    assert (
        next(
            check["value"] for check in done.json["checks"] if check["name"] == "memory limit enforced during the test"
        )
        == "not enforced"
    )
    assert (
        "memory limit: not enforced, this system offers no cgroup to this user" in succeed("validate", bundle_copy).out
    )


@pytest.mark.skipif(
    run_limited(["true"], 2**30).enforced is None, reason="this system offers no memory limit to this user"
)
def test_a_limit_that_kills_is_reported_with_the_phase_reached(bundle_copy: Path) -> None:
    done = packager_("validate", with_budget(bundle_copy, 24 * 2**20), "--json")
    assert done.code == 3, done.err
    assert re.fullmatch(
        r"was killed at the memory limit \((cgroup v2|cgroup v1|systemd scope)\) in phase '(start|hashes|import|load)'",
        acceptance(done)["value"],
    )
    assert done.json["measured"]["heldout_nats"] > 0  # what the runtime computes is still known
    assert "NOT VALID" in packager_("validate", bundle_copy).out


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        pytest.param("import os; os.kill(os.getpid(), 11)", "crashed (SIGSEGV) in phase 'load'", id="crash"),
        pytest.param(
            "raise SystemExit('no such operator')",
            "ended with status 1 in phase 'load': no such operator",
            id="refusal",
        ),
    ],
)
def test_a_runtime_that_fails_is_a_row_of_the_report(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, ending: str, expected: str
) -> None:
    """And is not let into this process."""
    code = f"import sys; print('phase: load', file=sys.stderr, flush=True); {ending}"
    monkeypatch.setattr(
        "packager.validation.acceptance.run_limited",
        lambda command, limit: run_limited([sys.executable, "-c", code], limit),
    )
    monkeypatch.setattr(
        "packager.runtime.sessions.full_logits_session", Stop(1, AssertionError("the runtime was let in"))
    )
    done = packager_("validate", bundle_copy, "--json")
    assert done.code == 3, done.err
    assert acceptance(done)["value"] == expected
    assert {check["passed"] for check in done.json["checks"]} == {False, None}


def test_a_build_whose_runtime_crashes_is_published_as_not_valid(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "packager.validation.acceptance.run_limited",
        lambda command, limit: run_limited([sys.executable, "-c", "import os; os.abort()"], limit),
    )
    done = packager_("build", maps("llama"), "--profile", profile, "-o", tmp_path / "out.bundle")
    assert done.code == 3
    assert "crashed (SIGABRT) in phase 'start'" in " ".join(done.out.split())
    assert "build 1: predicted peak " in done.out
    assert ", not measured, weights " in done.out


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        pytest.param("smollm3", "do_rotary", 0, id="positions lost"),
        pytest.param("llama", "rotary_interleaved", 1, id="positions interleaved"),
        pytest.param("llama", "scale", 0.27, id="attention a little sharper"),
        pytest.param("mistral", "local_window_size", -1, id="sliding window lost"),
    ],
)
def test_a_graph_that_computes_otherwise_fails_validation(
    name: str, attribute: str, value: float, maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    """The exporter's defects of the past, made again: weights and hashes are right, the arithmetic is not."""
    out = tmp_path / "out.bundle"
    succeed("build", maps(name), "--profile", profile, "-o", out, "--no-validate")
    graph = out / "onnx" / "model_q4.onnx"
    model = ir.load(graph)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            kind = ir.AttributeType.INT if isinstance(value, int) else ir.AttributeType.FLOAT
            node.attributes.add(ir.Attr(attribute, kind, value))
    ir.save(model, graph)

    def admit(manifest: Any) -> None:
        for entry in manifest["files"]:
            if entry["role"] == "graph":
                entry.update(bytes=graph.stat().st_size, sha256=packager.io.files.sha256_file(graph))

    edited(admit, out / "packager.json")
    resign(out)
    done = packager_("validate", out, "--json")
    assert done.code == 3, done.err


# Interruptions and full disks


class Stop:
    """Raises `error` at the `moment`-th call."""

    def __init__(self, moment: int, error: BaseException) -> None:
        self.left, self.error = moment, error

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error


def staged(folder: Path) -> list[str]:
    return [name for name in names(folder) if "staging" in name or "retired" in name]


@pytest.mark.parametrize("moment", [1, 2, 3, 4, 6, 9])
def test_ctrl_c_while_building_leaves_nothing(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    stop = Stop(moment, KeyboardInterrupt())
    monkeypatch.setattr(Bars, "phase", stop)
    monkeypatch.setattr(Bars, "advance", stop)
    done = packager_("build", maps("llama"), "--profile", profile, "-o", tmp_path / "out.bundle")
    assert stop.left == 0, "the build ended before the moment of the interruption"
    assert done.code == 130
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", [1, 2, 4, 9, 25])
def test_ctrl_c_while_scoring_leaves_nothing_under_the_name_and_resumes(
    picos: Callable[[str], Pico],
    maps: Callable[[str], Path],
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: int,
) -> None:
    out = tmp_path / "out.map"
    command = [
        "score",
        picos("llama").folder,
        "-o",
        out,
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
    ]
    stop = Stop(moment, KeyboardInterrupt())
    with monkeypatch.context() as patch:
        patch.setattr(Bars, "phase", stop)
        patch.setattr(Bars, "advance", stop)
        assert packager_(*command).code == 130
    assert stop.left == 0
    assert not out.exists()
    assert staged(tmp_path) == []
    succeed(*command)
    assert names(tmp_path) == ["out.map"]
    assert (out / "store.safetensors").read_bytes() == (maps("llama") / "store.safetensors").read_bytes()
    assert read_map(out) == read_map(maps("llama"))


def test_ctrl_c_keeps_the_old_bundle(
    bundle_copy: Path, maps: Callable[[str], Path], profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")}
    monkeypatch.setattr(Bars, "advance", Stop(1, KeyboardInterrupt()))
    assert (
        packager_("build", maps("llama"), "--profile", profile, "-o", bundle_copy, "--no-validate", "--force").code
        == 130
    )
    assert {path: path.stat().st_mtime_ns for path in bundle_copy.rglob("*")} == before
    assert names(bundle_copy.parent) == ["copy.bundle"]


def full_after(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    stop = Stop(count, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    def guarded(*arguments: Any, **named: Any) -> Any:
        stop()
        return function(*arguments, **named)

    return guarded


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("where", ["sendfile", "fsync", "copyfile"])
def test_a_full_disk_while_building_leaves_nothing(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, count: int
) -> None:
    if where == "copyfile":
        count = min(count, 4)
    owner = shutil if where == "copyfile" else os
    monkeypatch.setattr(owner, where, full_after(count, getattr(owner, where)))
    done = packager_("build", maps("llama"), "--profile", profile, "-o", tmp_path / "out.bundle", "--no-validate")
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("packager: no space left on the disk of ")
    assert last.endswith("; nothing was left half-written")
    assert names(tmp_path) == []


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("where", ["_pieces", "fsync", "save_file"])
def test_a_full_disk_while_scoring_leaves_nothing_under_the_name(
    picos: Callable[[str], Pico],
    calibration_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    count: int,
) -> None:
    import packager.scoring.workspace

    owner: Any = {"_pieces": packager.io.safetensors_ranges, "fsync": os, "save_file": packager.scoring.workspace}[
        where
    ]
    command = [
        "score",
        picos("llama").folder,
        "-o",
        tmp_path / "out.map",
        "--calibration",
        calibration_text,
        "--tokens",
        2048,
        "--quick",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, full_after(count, getattr(owner, where)))
        done = packager_(*command)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("packager: no space left on the disk of ")
    assert not (tmp_path / "out.map").exists()
    assert staged(tmp_path) == []
    succeed(*command)
    assert names(tmp_path) == ["out.map"]


# Outputs


def test_an_output_never_replaces_an_input_or_another_kind(
    picos: Callable[[str], Pico],
    maps: Callable[[str], Path],
    bundle_copy: Path,
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(maps("llama"), tmp_path / "pico-llama.map"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(Bars, "phase", lambda *arguments: pytest.fail("the work began"))
    device = ["--profile", profile]
    model = picos("llama").folder
    for command, why in (
        (["build", folder, *device, "-o", folder], "is the input"),
        (["build", folder, *device, "-o", folder / "skeleton" / "x"], "is inside the input"),
        (["build", folder, *device, "-o", tmp_path], "holds the input"),
        (["pack", model, *device, "-o", folder], "it is no bundle of ours (packager.json is missing)"),
        (["pack", model, *device, "-o", bundle_copy, "--map", bundle_copy], "is the input"),
        (["score", model, "-o", bundle_copy], "it is no map of ours (map.json is missing)"),
        (["build", maps("llama"), *device, "-o", folder], "it is no bundle of ours (packager.json is missing)"),
        (["plan", folder, *device, "-o", folder / "map.json"], "is inside the input"),
        (["plan", folder, *device, "-o", profile], "is the input"),
    ):
        done = packager_(*command, "--force")
        assert done.code == 1, command
        assert why in done.err
        assert done.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_plan_is_written_over_a_plan_and_over_nothing_else(
    maps: Callable[[str], Path], profile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "plan.json"
    command = ["plan", maps("llama"), "--profile", profile, "-o", out]
    succeed(*command)
    plan = out.read_bytes()
    succeed(*command)
    for content in (b"precious", b"{}", b"[]"):
        out.write_bytes(content)
        done = packager_(*command)
        assert (done.code, out.read_bytes()) == (1, content)
        assert "exists already: choose another name, or pass --force to replace it" in done.err
    succeed(*command, "--force")
    assert out.read_bytes() == plan


def test_what_cannot_be_kept_of_a_validation_is_said_and_the_verdict_stands(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import packager.validation.report_page

    def read_only(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(bundle_copy / "report.json"))

    monkeypatch.setattr(packager.validation.report_page, "write_text", read_only)
    done = packager_("validate", bundle_copy, "--json")
    assert done.json["passed"] is (done.code == 0)
    beginning = "packager: warning: the report is not kept: cannot write "
    (said,) = (line for line in done.err.splitlines() if line.startswith(beginning))
    assert "that file system is read-only" in said


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("verb", ["score", "build", "pack", "curve", "calibrate", "plan"])
def test_a_place_that_takes_nothing_is_told_before_the_work(
    verb: str,
    number: int,
    picos: Callable[[str], Pico],
    maps: Callable[[str], Path],
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, opened = tmp_path / "place", os.open
    place.mkdir()

    def refuse(path: Any, *rest: Any, **named: Any) -> int:
        if str(path).startswith(str(place)) and rest[0] & os.O_RDWR:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *rest, **named)

    command: list[object] = {
        "score": ["score", picos("llama").folder, "-o", place / "out"],
        "build": ["build", maps("llama"), "--profile", profile, "-o", place / "out"],
        "pack": ["pack", picos("llama").folder, "--profile", profile, "-o", place / "out"],
        "curve": ["curve", maps("llama"), "--measure", 2, "-o", place / "out.svg"],
        "calibrate": ["profiles", "calibrate", "--base", "edge-box-256mb", "-o", place / "out.toml"],
        "plan": ["plan", maps("llama"), "--profile", profile, "-o", place / "out.json"],
    }[verb]
    monkeypatch.setattr(Bars, "phase", lambda *arguments: pytest.fail("the work began"))
    monkeypatch.setattr(os, "open", refuse)
    done = packager_(*command)
    assert done.code == 1
    assert done.err.startswith(f"packager: cannot write {place}/out")
    assert done.err.count("\n") == 1
    assert names(place) == []
