"""The settings of a map: typed, checked where they are read, the same on disk as ever."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.errors import ArtifactError
from packager.scoremap.identity import MapIdentity
from packager.scoremap.settings import QUICK_ACIP, AcipSettings, ScoreSettings

OLD = """
{
  "anchors": [],
  "calibration": {"sha256": "c0", "text": "text.txt", "tokens": 2048},
  "files": {},
  "geometry": {"head_dim": 16, "heads": 4, "hidden": 64, "intermediate": 104, "kv_heads": 2, "layers": 2, "nodes": 40,
               "tokenizer_bytes": 9000, "vocab": 384},
  "losses": {"heldout_nats": 3.5},
  "model": {"architecture": "LlamaForCausalLM", "float16_bytes": 200000, "max_context_tokens": 1024, "name": "pico",
            "parameters": 100000, "sha256": "a0", "source": "pico"},
  "probes": [],
  "schema": 2,
  "settings": {"acip": null, "float_only": false, "provider": "cpu", "quick": true, "sampled_labels": false, "seed": 0,
               "tokens": 2048},
  "versions": {"torch": "2.9.0"}
}
"""
"""A `map.json` as it was written while labels could be drawn from the model."""


def old(**changes: Any) -> dict[str, Any]:
    """The old map.json with some of its settings changed."""
    data: dict[str, Any] = json.loads(OLD)
    return data | {"settings": data["settings"] | changes}


def test_a_map_of_before_opens() -> None:
    identity = MapIdentity.from_dict(old(), "map.json")
    assert identity.settings == ScoreSettings(tokens=2048, quick=True)
    assert set(identity.to_dict()["settings"]) == set(old()["settings"]) - {"sampled_labels"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampled_labels": True}, "key 'sampled_labels' is unknown"),
        ({"sampled_labels": 0}, "key 'sampled_labels' is unknown"),
        ({"labels": False}, "key 'labels' is unknown"),
        ({"tokens": "many"}, "settings: tokens is 'many': expected int"),
        ({"acip": {"rank": 8}}, "settings: acip: key 'rank' is unknown"),
        ({"acip": {"steps": 0}}, "settings: ACIP's steps is 0: expected at least 1: the file is damaged"),
    ],
)
def test_settings_that_no_version_wrote_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtifactError, match=r"^map\.json: ") as caught:
        MapIdentity.from_dict(old(**changes), "map.json")
    assert said in str(caught.value)


@pytest.mark.parametrize("acip", [None, QUICK_ACIP])
def test_settings_are_read_as_they_were_written(acip: AcipSettings | None) -> None:
    settings = ScoreSettings(tokens=512, seed=7, provider="cuda", float_only=True, acip=acip)
    plain = json.loads(json.dumps(dataclasses.asdict(settings)))
    assert MapIdentity.from_dict(old() | {"settings": plain}, "map.json").settings == settings


def test_differences_are_said_by_name() -> None:
    found, wanted = ScoreSettings(seed=1, acip=QUICK_ACIP), ScoreSettings(float_only=True)
    assert found.differences(found) == []
    assert found.differences(wanted) == [
        f"acip {dataclasses.asdict(QUICK_ACIP)!r} in place of None",
        "float_only False in place of True",
        "seed 1 in place of 0",
    ]


def test_the_command_line_checks_settings_without_torch(tmp_path: Path) -> None:
    command = ["score", "demo", "-o", str(tmp_path / "out.map"), "--method", "acip", "--acip-steps", "0"]
    code = f"import sys, packager.cli.command as c; sys.exit(c.main({command!r}))"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "| torch" not in done.stderr
    assert "--acip-steps: expected a whole number, at least 1, found 0" in done.stderr


def test_a_new_map_has_typed_settings(maps: Callable[[str], Path]) -> None:
    data = json.loads((maps("llama") / "map.json").read_text())
    assert set(data["settings"]) == {field.name for field in dataclasses.fields(ScoreSettings)}
    assert MapIdentity.from_dict(data, "map.json").settings == ScoreSettings(tokens=2048, quick=True)
