"""Files that once ended in a traceback, in gigabytes, or were taken as good: each is refused in words, at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from readers import Reader, every_reader, refused
from safetensors.numpy import load_file, save_file

from packager.errors import PackagerError
from packager.profile import load_profile
from packager.scoremap.model import read_map

HUGE, DEEP = "9" * 400, "[" * 3000 + "]" * 3000


@pytest.fixture(scope="module")
def readers(
    tmp_path_factory: pytest.TempPathFactory, maps: Callable[[str], Path], picos: Callable[[str], Any]
) -> dict[str, Reader]:
    return every_reader(tmp_path_factory.mktemp("fuzz"), maps, picos)


def put(*path: Any, value: str) -> Callable[[str], str]:
    """JSON with the text `value` in the place that `path` leads to."""

    def change(text: str) -> str:
        root = json.loads(text)
        inside = root
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = "@here@"
        return json.dumps(root).replace('"@here@"', value)

    return change


CASES: dict[str, tuple[str, Callable[[str], str]]] = {
    "a vocabulary of none": ("map.json", put("geometry", "vocab", value="0")),
    "a float16 model of no bytes": ("map.json", put("model", "float16_bytes", value="0")),
    "layers without end": ("map.json", put("geometry", "layers", value="1" + "0" * 400)),
    "thousands of digits": ("map.json", put("geometry", "layers", value="9" * 5000)),
    "a negative size": ("map.json", put("geometry", "tokenizer_bytes", value="-1")),
    "half of a character": ("map.json", put("model", "name", value='"\\ud800"')),
    "an escape for the terminal": ("map.json", put("model", "name", value='"\\u001b[2J"')),
    "NaN in the settings": ("map.json", put("settings", "seed", value="NaN")),
    "infinity in the losses": ("map.json", put("losses", "heldout_nats", value="1e999")),
    "a key twice": ("map.json", lambda text: text.replace("{", '{"schema": 2, ', 1)),
    "deep JSON": ("map.json", put("versions", value=DEEP)),
    "digests that are no object": ("store.json", lambda text: "[]"),
    "a plan of huge numbers": ("plan.json", put("peak_bytes", value=HUGE)),
    "a plan of an infinite ratio": ("plan.json", put("ratio", value="1e999")),
    "a plan of a negative size": ("plan.json", put("file_bytes", value="-5")),
    "a plan without memory": ("plan.json", put("memory", value="{}")),
    "memory without phases": ("plan.json", put("memory", "phases", value="{}")),
    "a context of none": ("signed packager.json", put("bounds", "context_tokens", value="0")),
    "a budget of 400 digits": ("signed packager.json", put("bounds", "budget_bytes", value=HUGE)),
    "no predicted memory": ("signed packager.json", put("predicted", "memory", value="{}")),
    "infinite loss": ("signed packager.json", put("predicted", "loss_nats", value="Infinity")),
    "no length": ("genai_config.json", put("search", value="{}")),
    "no model": ("genai_config.json", put("model", value="{}")),
    "a deep configuration": ("genai_config.json", lambda text: DEEP),
    "a layer count of 5,000 digits": ("config.json", put("num_hidden_layers", value="9" * 5000)),
    "a schema of endless words": ("plan.json", put("schema", value='"' + "x" * 100_000 + '"')),
    "an architecture of half a character": ("config.json", put("architectures", value='["\\ud800"]')),
    "a model type of endless words": ("config.json", put("model_type", value='"' + "x" * 100_000 + '"')),
    "a deep vocabulary": ("generation_config.json", lambda text: DEEP),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_found_is_refused(readers: dict[str, Reader], case: str) -> None:
    name, change = CASES[case]
    assert refused(readers[name], change(readers[name].file.read_text()).encode())


def test_a_report_of_odd_rounds_has_none_of_them(readers: dict[str, Reader]) -> None:
    reader = readers["report.json"]
    change = put("rounds", 0, "measured_bytes", value=HUGE)
    assert not refused(reader, change(reader.file.read_text()).encode())


@pytest.mark.parametrize(
    "line",
    ["tokens = " + "9" * 5000, "tokens = 0x" + "f" * 5000, "tokens = " + DEEP, "tokens = inf", "tokens = 1e400"],
)
def test_profiles_of_endless_values_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "box.toml"
    path.write_text('[device]\nmemory = "1GiB"\nbudget = "50%"\n[runtime]\n[context]\n' + line + "\n")
    with pytest.raises(PackagerError) as caught:
        load_profile(str(path))
    assert len(str(caught.value)) < 600


def _described(change: Callable[[Any], object]) -> Callable[[Any, Any], object]:
    return lambda arrays, described: change(described)


SCOREMAPS: dict[str, Callable[[Any, Any], object]] = {
    "a form again": _described(
        lambda value: value["units"][0]["options"].__setitem__(1, value["units"][0]["options"][0])
    ),
    "no options": _described(lambda value: value["units"][0].update(options=[])),
    "negative rows": _described(lambda value: value["units"][0].update(rows=-8)),
    "rows without end": _described(lambda value: value["units"][0].update(rows=10**400)),
    "a unit again": _described(lambda value: value["units"][1].update(name=value["units"][0]["name"])),
    "options of no texts": _described(lambda value: value["units"][0].update(options=3)),
    "infinite bytes": lambda arrays, described: arrays.update(
        option_bytes=np.full_like(arrays["option_bytes"], np.inf, dtype=np.float64)
    ),
    "losses that are none": lambda arrays, described: arrays["option_loss_nats"].fill(np.nan),
    "moves of units that are not there": lambda arrays, described: arrays["moves"].fill(99999),
}


@pytest.mark.parametrize("case", SCOREMAPS)
def test_odd_score_maps_are_refused(maps: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    source = maps("llama") / "scoremap.safetensors"
    arrays = dict(load_file(source))
    content = source.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    described = json.loads(header["__metadata__"]["scoremap"])
    SCOREMAPS[case](arrays, described)
    save_file(arrays, tmp_path / "scoremap.safetensors", {"scoremap": json.dumps(described)})
    with pytest.raises(PackagerError):
        read_map(tmp_path)


def test_a_deep_score_map_is_refused(maps: Callable[[str], Path], tmp_path: Path) -> None:
    arrays = load_file(maps("llama") / "scoremap.safetensors")
    save_file(arrays, tmp_path / "scoremap.safetensors", {"scoremap": '{"a":' * 3000 + "1" + "}" * 3000})
    with pytest.raises(PackagerError, match=r"is damaged \(ValueError: nested too deep\)"):
        read_map(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heldout", np.zeros((2, 2, 2), np.int32)),
        ("heldout", np.zeros((0, 8), np.int32)),
        ("heldout", np.full((2, 8), -1, np.int32)),
        ("heldout_nats", np.zeros((1, 1), np.float32)),
        ("vector.odd", np.full(8, np.nan, np.float32)),
        ("cache.x.key", np.ones(2, np.float32)),
        ("cache." + "9" * 5000 + ".key", np.ones(2, np.float32)),
        ("cache.0.key", np.zeros(2, np.float32)),
    ],
)
def test_odd_reference_files_are_refused(readers: dict[str, Reader], name: str, value: Any) -> None:
    reader = readers["reference.safetensors"]
    path = reader.file.with_name("odd.safetensors")
    save_file({**load_file(reader.file), name: value}, path)
    try:
        assert refused(reader, path.read_bytes())
    finally:
        path.unlink()


@pytest.mark.parametrize("text", ['[{"text": "one"}, ' + "9" * 5000 + "]", DEEP])
def test_odd_calibration_texts_are_refused(readers: dict[str, Reader], text: str) -> None:
    assert refused(readers["all.json"], text.encode())
    assert refused(readers["all.json"], b'["\xff"]')
