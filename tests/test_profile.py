"""Device profiles: shipped ones parse; what is wrong in one is said with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from packager.errors import ProfileError
from packager.profile import (
    DeviceProfile,
    MemoryCoefficients,
    load_profile,
    parse_profile,
    shipped_profiles,
    with_memory,
)

GOOD = """\
[device]
memory = "256MiB"
budget = "50%"

[runtime]

[context]
tokens = 512
"""


def parse(text: str) -> DeviceProfile:
    return parse_profile(text, where="box.toml", name="box")


def message(text: str) -> str:
    with pytest.raises(ProfileError) as caught:
        parse(text)
    assert caught.value.exit_code == 1
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profiles_parse(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    assert 0 < profile.budget_bytes <= profile.memory_bytes
    assert profile.toml.startswith("[device]")


def test_there_are_shipped_profiles() -> None:
    assert {"edge-box-256mb", "laptop-16gb", "raspberry-pi-4-4gb", "raspberry-pi-5-8gb"} <= set(shipped_profiles())
    box = load_profile("edge-box-256mb")
    assert (box.memory_bytes, box.budget_bytes) == (256 * 2**20, 224 * 2**20)


def test_defaults() -> None:
    profile = parse(GOOD)
    assert (profile.memory_bytes, profile.budget_bytes, profile.context_tokens) == (256 * 2**20, 128 * 2**20, 512)
    assert (profile.provider, profile.bits, profile.accuracy_level, profile.chunk_tokens, profile.threads) == (
        "cpu",
        (2, 4, 8),
        4,
        128,
        0,
    )
    assert profile.minimum_context_tokens == 512
    assert parse(GOOD + "minimum = 256\n").minimum_context_tokens == 256
    assert profile.coefficients == MemoryCoefficients()
    assert profile.toml == GOOD


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("edge-box-256")
    assert str(caught.value).startswith("profile 'edge-box-256' is unknown: did you mean edge-box-256mb")
    with pytest.raises(ProfileError) as caught:
        load_profile("zzzz")
    known = ", ".join(shipped_profiles())
    assert (
        str(caught.value) == f"profile 'zzzz' is unknown: shipped profiles: {known}. A path to a .toml file works too."
    )


@pytest.mark.parametrize("name", ["../profiles/edge-box-256mb", "/etc/passwd", "", "."])
def test_a_name_is_not_a_path(name: str) -> None:
    with pytest.raises(ProfileError, match=rf"^profile '{name}' is unknown: "):
        load_profile(name)


def test_a_file_by_path(tmp_path: Path) -> None:
    path = tmp_path / "box.toml"
    path.write_text(GOOD)
    assert load_profile(str(path)).name == "box"
    with pytest.raises(ProfileError) as caught:
        load_profile(str(tmp_path / "no.toml"))
    assert str(caught.value) == f"profile {tmp_path / 'no.toml'} cannot be read: No such file or directory"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"^profile .*box\.toml cannot be read: "):
        load_profile(str(path))


def test_malformed_toml_is_located() -> None:
    assert (
        message(GOOD.replace('budget = "50%"', "budget = 50%"))
        == "box.toml: not valid TOML: Expected newline or end of document after a statement (at line 3, column 12)"
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[runtime]", "[runtime]\nbit = [4]", "unknown key runtime.bit: did you mean bits?"),
        (
            "[runtime]",
            "[runtime]\nzzz = 1",
            "unknown key runtime.zzz: expected accuracy_level, bits, chunk_tokens, kv_cache, provider",
        ),
        (
            "[runtime]",
            "[runtime]\n[extra]",
            "unknown section [extra]: expected [device], [runtime], [context], [memory]",
        ),
        ("[runtime]", "", "section [runtime] is missing"),
        ("tokens = 512", "", "key 'tokens' is missing"),
        pytest.param(
            "tokens = 512", "tokens = 16", "context.tokens 16: expected at least 33", id="a context too short"
        ),
        pytest.param(
            "tokens = 512",
            "tokens = 512\nminimum = 16",
            "context.minimum 16: expected at least 33",
            id="a minimum too short",
        ),
        ("tokens = 512", "tokens = 512\nminimum = 513", "context.minimum 513 is more than context.tokens 512"),
        ("tokens = 512", 'tokens = "512"', "tokens is '512': expected int"),
        ("tokens = 512", "tokens = true", "tokens is True: expected int"),
        (
            'memory = "256MiB"',
            'memory = "12 parsecs"',
            "device.memory: '12 parsecs' is not a size: expected bytes, a unit such as 700MB or 1.5GiB, or a share "
            "such as 60%",
        ),
        (
            'memory = "256MiB"',
            'memory = "50%"',
            "device.memory: '50%' is a share, and there is no device memory to take it of: give bytes",
        ),
        ('budget = "50%"', 'budget = "1GiB"', "device.budget 1073741824 is more than device.memory 268435456"),
        pytest.param(
            'budget = "50%"',
            'budget = "50%"\nthreads = -1',
            "device.threads -1: expected at least 0",
            id="threads below zero",
        ),
        ("[runtime]", '[runtime]\nprovider = "tpu"', "runtime.provider 'tpu': expected one of cpu, cuda, dml, webgpu"),
        ("[runtime]", "[runtime]\nbits = [3]", "runtime.bits [3]: expected some of 2, 4, 8 (none: float only)"),
        pytest.param(
            "[runtime]",
            "[runtime]\nbits = [[4]]",
            "runtime.bits [[4]]: expected some of 2, 4, 8 (none: float only)",
            id="bits of lists",
        ),
        ("[runtime]", "[runtime]\naccuracy_level = 5", "runtime.accuracy_level 5: expected 0 to 4"),
        ("[runtime]", "[runtime]\nchunk_tokens = 0", "runtime.chunk_tokens 0: expected at least 1"),
        (
            "[runtime]",
            "[memory]\nlogit_copies = -1\n[runtime]",
            "memory.logit_copies is -1.0: expected a float, not negative",
        ),
        (
            "[runtime]",
            "[memory]\nreuse_ratio = 1.5\n[runtime]",
            "memory.reuse_ratio is 1.5: expected a share, at most 1",
        ),
        pytest.param(
            "[runtime]",
            "[memory]\nlogit_copies = true\n[runtime]",
            "memory.logit_copies is True: expected a float, not negative",
            id="a coefficient true",
        ),
        pytest.param(
            "[runtime]",
            "[memory]\nlogit_copies = nan\n[runtime]",
            "memory.logit_copies is nan: expected a float, not negative",
            id="a coefficient nan",
        ),
        pytest.param(
            "[runtime]",
            "[memory]\nrun_bytes = true\n[runtime]",
            "memory.run_bytes is True: expected a int, not negative",
            id="a whole coefficient true",
        ),
    ],
)
def test_what_is_wrong_is_located(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert message(GOOD.replace(old, new)) == f"box.toml: {expected}"


def test_coefficients_are_read() -> None:
    profile = parse(GOOD + "[memory]\nlogit_copies = 2\nrun_bytes = 5\nmeasured_on = 'here'\n")
    assert (profile.coefficients.logit_copies, profile.coefficients.run_bytes, profile.coefficients.measured_on) == (
        2.0,
        5,
        "here",
    )


VALUES = {
    "measured_on": 'a "board"',
    "measured_date": "2026-01-02",
    "onnxruntime": "1.2",
    "onnxruntime_genai": "0.3",
    "packager": "0.4",
    "run_bytes": 7,
}


@pytest.mark.parametrize(
    "section", ["", "[memory]\nlogit_copies = 2\n# a remark\nrun_bytes = 5\n", "[memory] # old\nlogit_copies = 2\n"]
)
def test_the_memory_section_is_replaced_and_the_rest_stays(section: str) -> None:
    text = GOOD.replace("[runtime]", f"{section}[runtime] # kernels")
    written = with_memory(parse(text), VALUES)
    found = parse(written)
    assert found.coefficients == MemoryCoefficients(**VALUES)  # type: ignore[arg-type]
    assert (found.budget_bytes, found.context_tokens) == (128 * 2**20, 512)
    assert written.endswith('packager = "0.4"\nrun_bytes = 7\n')
    assert written.count("[memory]") == 1
    assert "[runtime] # kernels" in written
    assert with_memory(found, VALUES) == written
    assert (
        found.coefficients.provenance == 'a "board"; 2026-01-02, onnxruntime 1.2, onnxruntime-genai 0.3, packager 0.4'
    )


def test_a_memory_section_that_cannot_be_replaced_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"box with new coefficients"):
        with_memory(parse("memory = { run_bytes = 5 }\n" + GOOD), VALUES)
