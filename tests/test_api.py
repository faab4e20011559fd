"""What `import packager` shows: names, types, errors, and examples that run."""

from __future__ import annotations

import doctest
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Pico

import packager
from packager import errors
from packager.api import arguments, calls
from packager.errors import ArtifactError, InfeasibleBudgetError, MissingExtraError, PackagerError, UsageError
from packager.planning.plan import PROMPT_RESERVE
from packager.profile import DeviceProfile

PROFILE = """\
[device]
description = "room for a pico model, whatever the process needs on this machine"
memory = "1GiB"
budget = "50%"

[runtime]
chunk_tokens = 32

[context]
tokens = 512

[memory]
process_bytes = 134217728
process_load_bytes = 134217728
"""
PUBLIC = {
    "Progress",
    "__version__",
    "build",
    "calibrate_profile",
    "chat",
    "curve",
    "errors",
    "frontier",
    "inspect",
    "load_profile",
    "open_bundle",
    "open_map",
    "pack",
    "plan",
    "profiles",
    "run",
    "score",
    "validate",
    "write_plan",
}
FUNCTIONS = sorted(name for name in PUBLIC if inspect.isfunction(getattr(packager, name)))


@pytest.fixture(scope="module")
def desk(
    tmp_path_factory: pytest.TempPathFactory,
    picos: Callable[[str], Pico],
    maps: Callable[[str], Path],
    calibration_text: Path,
) -> Path:
    """A folder with what the examples name: pico-llama, pico.map, pico.bundle, box.toml, text.txt."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(picos("llama").folder, folder / "pico-llama")
    shutil.copytree(maps("llama"), folder / "pico.map")
    shutil.copyfile(calibration_text, folder / "text.txt")
    profile = folder / "pico-box.toml"
    profile.write_text(PROFILE)
    packager.build(folder / "pico.map", profile=profile, out=folder / "pico.bundle", validate=False)
    return folder


def plain_python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | environment
    ).stdout


# Names


def test_the_public_names_are_these_and_exist() -> None:
    assert set(packager.__all__) == PUBLIC
    assert list(packager.__all__) == sorted(packager.__all__)
    assert set(dir(packager)) >= PUBLIC
    assert all(getattr(packager, name) is not None for name in PUBLIC)
    assert packager.errors is errors
    with pytest.raises(AttributeError, match=r"^module 'packager' has no attribute 'unpack'$"):
        packager.unpack  # type: ignore[attr-defined]  # noqa: B018


def test_types_are_shipped() -> None:
    assert (Path(packager.__file__).parent / "py.typed").is_file()


def test_importing_loads_nothing_and_takes_no_time() -> None:
    heavy = {"torch", "transformers", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "argparse"}
    code = f"import packager, sys; print({heavy!r} & set(sys.modules), 'packager.api' in sys.modules)"
    assert plain_python(code) == "set() False\n"
    assert plain_python(f"import packager, sys; packager.pack; print({heavy!r} & set(sys.modules))") == "set()\n"
    timed = "import time; start = time.process_time(); import packager; print(time.process_time() - start)"
    # The least of a few: other work on the machine only adds.
    assert min(float(plain_python(timed)) for _ in range(3)) < 0.05


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_argument_goes_by_position_and_the_rest_have_names(name: str) -> None:
    parameters = list(inspect.signature(getattr(packager, name)).parameters.values())
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[1:])
    assert all(parameter.annotation is not parameter.empty for parameter in parameters)


def test_the_defaults_are_the_command_s() -> None:
    from packager.cli.parser import parse

    names = {"no_validate": "validate", "raw": "chat", "output": "out"}
    lines = {
        "pack": "m --profile p -o o",
        "score": "m -o o",
        "plan": "m --profile p",
        "build": "m --profile p -o o",
        "curve": "m",
        "run": "b --prompt x",
    }
    for verb, line in lines.items():
        parsed = vars(parse([verb, *line.split()]))
        for parameter in inspect.signature(getattr(packager, verb)).parameters.values():
            if parameter.default is parameter.empty or parameter.name in ("progress", "acip"):
                continue
            flag = next(
                (key for key, name in names.items() if name == parameter.name and key in parsed), parameter.name
            )
            told = not parsed[flag] if flag in ("no_validate", "raw") else parsed[flag]
            assert (told or None) == (parameter.default or None), (verb, parameter.name)


# Examples


@pytest.mark.parametrize("name", [*FUNCTIONS, "packager"])
def test_the_examples_run(name: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    documented: Any = packager if name == "packager" else getattr(packager, name)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(documented, name) if test.examples]
    assert tests, f"{name} has no example"
    for test in tests:
        result = doctest.DocTestRunner().run(test)
        assert result.failed == 0


# Arguments


def test_a_profile_is_a_name_a_path_or_itself(desk: Path) -> None:
    by_path = packager.load_profile(desk / "pico-box.toml")
    assert isinstance(by_path, DeviceProfile)
    assert packager.load_profile(str(desk / "pico-box.toml")) == by_path
    assert packager.load_profile(by_path) is by_path
    assert [profile.name for profile in packager.profiles()] == sorted(profile.name for profile in packager.profiles())
    plans = [packager.plan(desk / "pico.map", profile=form) for form in (by_path, desk / "pico-box.toml")]
    assert plans[0] == plans[1] == packager.plan(packager.open_map(desk / "pico.map"), profile=by_path)


def test_a_budget_is_bytes_or_text(desk: Path) -> None:
    opened, profile = packager.open_map(desk / "pico.map"), packager.load_profile(desk / "pico-box.toml")
    for budget in (600 * 2**20, "600MiB", "58.59375%"):
        assert packager.plan(opened, profile=profile, budget=budget).budget_bytes == 600 * 2**20
    with pytest.raises(InfeasibleBudgetError) as infeasible:
        packager.plan(opened, profile=profile, budget=1)
    assert infeasible.value.minimum_bytes > infeasible.value.budget_bytes == 1


def test_integers_of_other_libraries_are_integers(desk: Path) -> None:
    import numpy as np

    assert (
        packager.plan(
            desk / "pico.map",
            profile=desk / "pico-box.toml",
            context=np.int64(64),  # type: ignore[arg-type]
        ).context_tokens
        == 64
    )


TARGET = {"profile": "laptop-16gb"}
OUT = {"profile": "laptop-16gb", "out": "never"}


@pytest.mark.parametrize(
    ("name", "first", "named", "message"),
    [
        ("plan", 3, TARGET, "map: expected a folder or an opened map, found 3"),
        ("plan", "", TARGET, "map: expected a path, as text or as a Path, found ''"),
        ("plan", b"x", TARGET, "map: expected a folder or an opened map, found b'x'"),
        (
            "plan",
            "pico.map",
            {"profile": None},
            "profile: expected a name, a path to a .toml file or a DeviceProfile, found None",
        ),
        ("plan", "pico.map", TARGET | {"budget": 1.5}, "budget: expected a whole number, at least 1, found 1.5"),
        ("plan", "pico.map", TARGET | {"budget": True}, "budget: expected a whole number, at least 1, found True"),
        ("plan", "pico.map", TARGET | {"budget": 0}, "budget: expected a whole number, at least 1, found 0"),
        (
            "plan",
            "pico.map",
            TARGET | {"context": "all"},
            "context: expected at least 33 tokens, or 'auto', found 'all'",
        ),
        ("plan", "pico.map", TARGET | {"context": 32}, "context: expected at least 33 tokens, or 'auto', found 32"),
        (
            "plan",
            "pico.map",
            TARGET | {"kv_cache": "int4"},
            "kv_cache: expected one of auto, float, int8, found 'int4'",
        ),
        ("plan", "pico.map", TARGET | {"out": 1}, "out: expected a path, as text or as a Path, found 1"),
        ("build", "pico.map", OUT | {"out": None}, "out: expected a path, as text or as a Path, found None"),
        ("build", "pico.map", OUT | {"force": "yes"}, "force: expected True or False, found 'yes'"),
        ("build", "pico.map", OUT | {"validate": 1}, "validate: expected True or False, found 1"),
        (
            "build",
            "pico.map",
            OUT | {"progress": print},
            f"progress: expected an object with phase, advance and warn, found {print!r}",
        ),
        (
            "build",
            "pico.map",
            OUT | {"polish": float("inf"), "model": "m"},
            "polish: expected a finite number above 0 and at most 1440, found inf",
        ),
        (
            "build",
            "pico.map",
            OUT | {"polish": 1},
            "polish needs the map's own model: name it too (--polish 10 --model FOLDER)",
        ),
        (
            "build",
            "pico.map",
            OUT | {"calibration": ["a", 2]},
            "calibration[1]: expected a path, as text or as a Path, found 2",
        ),
        ("curve", "pico.map", {"sizes": 1}, "sizes: expected a whole number from 2 to 1000, found 1"),
        ("curve", "pico.map", {"measure": 1001}, "measure: expected a whole number from 2 to 1000, found 1001"),
        ("curve", "pico.map", {"windows": "8"}, "windows: expected a whole number, at least 1, found '8'"),
        ("curve", "pico.map", {"context": "auto"}, "context: expected a whole number, at least 33, found 'auto'"),
        ("run", "pico.bundle", {"prompt": 3}, "prompt: expected text, found 3"),
        ("run", "pico.bundle", {"prompt": "x", "tokens": 0}, "tokens: expected a whole number, at least 1, found 0"),
        (
            "run",
            "pico.bundle",
            {"prompt": "x", "temperature": float("nan")},
            "temperature: expected a finite number, at least 0 and at most 100, found nan",
        ),
        (
            "run",
            "pico.bundle",
            {"prompt": "x", "top_k": 3},
            "top_k: at temperature 0 the likeliest token is always taken: set a temperature too, or leave it out",
        ),
        (
            "run",
            "pico.bundle",
            {"prompt": "x", "temperature": 1, "seed": 2**31},
            "seed: expected a whole number from 0 to 2147483647, found 2147483648",
        ),
        ("chat", "pico.bundle", {"tokens": 0}, "tokens: expected a whole number, at least 1, found 0"),
        ("validate", None, {}, "bundle: expected a path, as text or as a Path, found None"),
        ("inspect", None, {}, "path: expected a path, as text or as a Path, found None"),
        ("open_map", 1, {}, "path: expected a path, as text or as a Path, found 1"),
        ("open_bundle", 1, {}, "path: expected a path, as text or as a Path, found 1"),
        ("score", 3, {"out": "never"}, "model: expected a path, as text or as a Path, found 3"),
        ("score", "m", {"out": "never", "tokens": 0}, "tokens: expected a whole number, at least 1, found 0"),
        (
            "score",
            "m",
            {"out": "never", "seed": -1},
            "seed: expected a whole number from 0 to 9223372036854775807, found -1",
        ),
        (
            "score",
            "m",
            {"out": "never", "provider": "tpu"},
            "provider: expected one of cpu, cuda, dml, webgpu, found 'tpu'",
        ),
        ("score", "m", {"out": "never", "device": "mps"}, "device: expected cpu, cuda or cuda:N, found 'mps'"),
        ("score", "m", {"out": "never", "method": "magic"}, "method: expected one of curvature, acip, found 'magic'"),
        (
            "score",
            "m",
            {"out": "never", "acip": {"steps": 3}},
            "ACIP's settings are of another method: ask for the method acip (--method acip), or leave them out",
        ),
        (
            "score",
            "m",
            {"out": "never", "method": "acip", "acip": {"stop_ratio": 1}},
            "acip['stop_ratio']: expected a finite number above 0 and below 1, found 1",
        ),
        (
            "score",
            "m",
            {"out": "never", "method": "acip", "acip": {"step": 1}},
            "acip: 'step' is unknown: expected some of steps, step_tokens, tuning_steps, adapter_rank, adapter_rate, "
            "stop_ratio, basis",
        ),
        (
            "score",
            "m",
            {"out": "never", "method": "acip", "acip": 3},
            "acip: expected AcipSettings, or what differs from the defaults, found 3",
        ),
    ],
)
def test_what_an_argument_cannot_be(
    name: str, first: object, named: dict[str, Any], message: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    with pytest.raises(UsageError) as refused:
        getattr(packager, name)(first, **named)
    assert str(refused.value) == message
    assert not (desk / "never").exists()


def test_answers_by_chance_repeat_with_their_seed(desk: Path) -> None:
    def answer(seed: int) -> str:
        named: dict[str, Any] = {"prompt": "water", "tokens": 24, "chat": False, "temperature": 2.0}
        return "".join(packager.run(desk / "pico.bundle", **named, seed=seed))

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_a_conversation_goes_on_in_the_model_s_template(desk: Path) -> None:
    conversation = packager.chat(desk / "pico.bundle", tokens=4)
    first, second = conversation.say("Where is the water?"), None
    list(first)
    second = conversation.say("And now?")
    list(second)
    assert second.prompt_tokens > first.prompt_tokens


def test_cuda_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as refused:
        packager.score("m", out="never", device="cuda:1")
    assert str(refused.value) == (
        f"device: cuda:1 is not here: PyTorch {torch.__version__} finds no CUDA device; expected cpu"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError) as refused:
        packager.score("m", out="never", device="cuda:1")
    assert str(refused.value) == "device: cuda:1 is not here: expected cuda:0 to cuda:0"


def test_the_least_context_is_the_plan_s() -> None:
    assert arguments.CONTEXT.least == arguments.CONTEXT_TOKENS.least == PROMPT_RESERVE + 1


def test_rules_of_acip_are_those_of_its_settings() -> None:
    import dataclasses

    from packager.scoremap.settings import BASES, AcipSettings

    assert set(arguments.ACIP) <= {field.name for field in dataclasses.fields(AcipSettings)}
    assert arguments.ACIP_BASIS.words == BASES
    for name, rule in arguments.ACIP.items():
        assert rule.check(getattr(AcipSettings(), name)) == getattr(AcipSettings(), name)


@pytest.mark.parametrize("given", ["path", "opened"])
def test_a_plan_replaces_a_plan_and_no_input(given: str, desk: Path, tmp_path: Path) -> None:
    folder, out = desk / "pico.map", tmp_path / "plan.json"
    pico = folder if given == "path" else packager.open_map(folder)
    for _ in range(2):
        plan = packager.plan(pico, profile=desk / "pico-box.toml", out=out)
    out.write_text("precious")
    with pytest.raises(ArtifactError, match="pass --force to replace it"):
        packager.plan(pico, profile="laptop-16gb", out=out)
    for inner in (folder / "map.json", desk / "pico-box.toml"):
        with pytest.raises(ArtifactError, match="the input"):
            packager.plan(pico, profile=desk / "pico-box.toml", out=inner, force=True)
        with pytest.raises(ArtifactError, match="the input"):
            packager.write_plan(plan, out=inner, force=True, inputs=[folder, desk / "pico-box.toml"])
    assert out.read_text() == "precious"
    packager.write_plan(plan, out=out, force=True)
    assert packager.inspect(out) == plan


def test_what_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refused:
        packager.inspect(tmp_path)
    assert str(refused.value) == f"{tmp_path} is no score map, plan or bundle"


def test_an_extra_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, desk: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.chdir(desk)
    wanting: list[tuple[Callable[[], object], str]] = [
        (lambda: packager.score("m", out="never"), "'score'"),
        (lambda: packager.pack("m", profile="laptop-16gb", out="never"), "'pack'"),
        (lambda: packager.build("pico.map", **OUT, polish=1, model="m"), "polishing"),
        (lambda: packager.curve("pico.map", text="text.txt"), "measuring on a text of your own"),
        (lambda: packager.calibrate_profile("laptop-16gb", out="never.toml"), "'profiles calibrate'"),
    ]
    for call, purpose in wanting:
        with pytest.raises(MissingExtraError) as missing:
            call()
        assert str(missing.value) == (
            f'{purpose} needs torch, which is not installed: pip install "edge-packager[score]" '
            "(CPU only: pip install torch --index-url https://download.pytorch.org/whl/cpu first)"
        )
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        MissingExtraError, match=r"""^'score' needs gguf, which .*: pip install "edge-packager\[score\]"$"""
    ):
        packager.score("m", out="never")


# Progress


class ToldError(Exception):
    """Of no tree that the package knows."""


class Stopping:
    """Raises at its `moment`-th call."""

    def __init__(self, moment: int, error: Exception) -> None:
        self.left, self.error = moment, error

    def phase(self, name: str, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error

    def advance(self, steps: int = 1) -> None:
        self.phase("", steps)

    def warn(self, message: str) -> None:
        self.phase(message, 0)


def test_progress_is_told_in_phases(desk: Path, tmp_path: Path) -> None:
    phases: list[list[Any]] = []

    class Listening(Stopping):
        def phase(self, name: str, total: int) -> None:
            phases.append([name, total, 0])

        def advance(self, steps: int = 1) -> None:
            phases[-1][2] += steps

    packager.build(
        desk / "pico.map",
        profile="laptop-16gb",
        out=tmp_path / "out.bundle",
        validate=False,
        progress=Listening(0, ToldError()),
    )
    assert phases == [["writing the bundle", 1, 1]]


@pytest.mark.parametrize(
    "error", [ToldError("enough"), RuntimeError("enough"), OSError("enough"), UsageError("enough")]
)
@pytest.mark.parametrize("moment", [1, 2, 4, 5, 8])
def test_a_listener_that_raises_leaves_nothing_of_a_build(
    moment: int, error: Exception, desk: Path, tmp_path: Path
) -> None:
    stop = Stopping(moment, error)
    with pytest.raises(type(error)) as raised:
        packager.build(desk / "pico.map", profile=desk / "pico-box.toml", out=tmp_path / "out.bundle", progress=stop)
    assert raised.value is error
    assert raised.value.__cause__ is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", [1, 2, 3, 5, 12, 30])
def test_a_listener_that_raises_leaves_no_map(moment: int, desk: Path, tmp_path: Path) -> None:
    error = RuntimeError("enough")
    with pytest.raises(RuntimeError) as raised:
        packager.score(
            desk / "pico-llama",
            out=tmp_path / "out.map",
            calibration=desk / "text.txt",
            tokens=2048,
            quick=True,
            progress=Stopping(moment, error),
        )
    assert raised.value is error
    assert not (tmp_path / "out.map").exists()
    assert [path.name for path in tmp_path.iterdir() if "staging" in path.name] == []


def test_a_listener_that_raises_stops_a_measurement(desk: Path) -> None:
    error = RuntimeError("enough")
    with pytest.raises(RuntimeError) as raised:
        packager.curve(desk / "pico.map", sizes=3, measure=2, progress=Stopping(2, error))
    assert raised.value is error


def test_every_error_of_the_tree_is_a_packager_error() -> None:
    assert issubclass(MissingExtraError, UsageError)
    assert MissingExtraError.exit_code == UsageError.exit_code == 2
    assert issubclass(UsageError, PackagerError)
    assert arguments.SIZES.least <= calls.SOME_SIZES
