"""What is known of a bundle before it is used: from its report, where it has one of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import packager
from packager.cli.command import main
from packager.runtime.device_check import check_report
from packager.validation.report import verdict_of

HASH = "2" * 64
PASSED: dict[str, Any] = {"name": "speed", "value": 3.0, "limit": None, "unit": "", "passed": None}
FAILED: dict[str, Any] = {"name": "peak", "value": 3 << 20, "limit": 2 << 20, "unit": "bytes", "passed": False}
GOOD: dict[str, Any] = {"bundle_sha256": HASH, "checks": [PASSED], "passed": True}
BAD: dict[str, Any] = {"bundle_sha256": HASH, "checks": [PASSED, FAILED, FAILED], "passed": False}
PEAK = "peak: 3.0 MiB (limit 2.0 MiB)"


@pytest.mark.parametrize(
    ("report", "valid", "words"),
    [
        (None, None, "this bundle has no report, it was never validated: run 'packager validate {root}'"),
        (GOOD, True, ""),
        (
            BAD,
            False,
            f"this bundle's report says NOT VALID: {PEAK} and 1 more; for all of it run 'packager validate {{root}}'",
        ),
        (GOOD | {"checks": [FAILED]}, False, f"this bundle's report says NOT VALID: {PEAK}; for all of it run"),
        (GOOD | {"passed": False}, False, "this bundle's report says NOT VALID; for all of it run"),
        (GOOD | {"bundle_sha256": "3" * 64}, None, "this bundle's report is of another bundle: run"),
        (GOOD | {"checks": 3}, None, "this bundle's report cannot be read: run"),
        (GOOD | {"checks": [{}]}, None, "this bundle's report cannot be read: run"),
        ({"bundle_sha256": HASH}, None, "this bundle's report cannot be read: run"),
        (BAD | {"checks": [FAILED | {"value": 10**400}]}, None, "this bundle's report cannot be read: run"),
        (
            BAD | {"checks": [FAILED | {"name": "a\x1b[2Jb", "unit": "", "limit": None}]},
            False,
            "this bundle's report says NOT VALID: a?[2Jb: 3145728; for all of it run",
        ),
        ([], None, "this bundle's report cannot be read: run"),
    ],
)
def test_a_verdict_is_what_a_report_of_the_very_bundle_says(
    report: Any, valid: bool | None, words: str, tmp_path: Path
) -> None:
    (tmp_path / "packager.json").write_text(json.dumps({"bundle_sha256": HASH}))
    if report is not None:
        (tmp_path / "report.json").write_text(json.dumps(report))
    found = verdict_of(tmp_path)
    assert found.valid is valid
    assert found.words.startswith(words.format(root=tmp_path))
    assert bool(found.words) is (valid is not True)
    said = check_report(tmp_path, HASH)
    assert said["passed"] is None
    assert str(said["value"]).startswith({True: "valid", False: "NOT VALID", None: ("n", "NOT")}[valid])


def test_run_and_inspect_say_whether_the_bundle_is_valid(
    maps: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "taught.bundle"
    packager.build(maps("taught"), profile="laptop-16gb", context=128, out=bundle, validate=False)
    capsys.readouterr()
    run = ["run", str(bundle), "--prompt", "Where?", "--tokens", "2"]
    assert main(run) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"packager: warning: this bundle has no report, it was never validated: run 'packager validate {bundle}'\n"
    )
    assert "warning" not in said.out
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["valid"] is None
    assert packager.validate(bundle).passed
    assert main([*run, "--json"]) == 0
    said = capsys.readouterr()
    assert (said.err, json.loads(said.out)["valid"]) == ("", True)
    assert main(["inspect", str(bundle), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["valid"], described["report"]) == (True, "all checks passed")
    assert check_report(bundle, described["bundle_sha256"])["value"] == "valid"
    report = json.loads((bundle / "report.json").read_text())
    assert "what this bundle's own report says" not in {check["name"] for check in report["checks"]}
    report |= {"passed": False}
    report["checks"].append(FAILED)
    (bundle / "report.json").write_text(json.dumps(report))
    assert main([*run, "--json"]) == 0
    said = capsys.readouterr()
    assert f"packager: warning: this bundle's report says NOT VALID: {PEAK}; for all of it run" in said.err
    assert json.loads(said.out)["valid"] is False
    assert check_report(bundle, described["bundle_sha256"])["value"] == "NOT VALID: peak"
