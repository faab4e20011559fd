"""Without what Windows and macOS lack: plan, build, run and a bundle's own check do their work.

A process in which fcntl, resource and /proc cannot be had by this package, nor POSIX's signals and calls by anybody.
What only such a system could show is shown nowhere here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import packager

# Libraries were built for this system and may use what it has: only what this package and a bundle's check do is told
# from.
HIDE = """
import builtins, os, signal, sys

def ours(depth):
    frame = sys._getframe(depth)
    while frame and frame.f_code.co_filename.endswith(("pathlib.py", "contextlib.py")):
        frame = frame.f_back
    name = frame.f_code.co_filename if frame else ""
    return ("/packager/" in name and "site-packages" not in name) or name.endswith("check.py")

imported = builtins.__import__

def without(name, *rest, **named):
    if name in ("fcntl", "resource", "grp", "pwd", "termios") and ours(2):
        raise ImportError(f"{name} is not on this system")
    return imported(name, *rest, **named)

def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc") and ours(2):
        raise FileNotFoundError(arguments[0])

builtins.__import__ = without
sys.addaudithook(watch)
calls = ("sendfile", "copy_file_range", "killpg", "symlink", "umask", "getpgid", "setsid", "mkfifo")
for owner, names in ((signal, ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGPIPE")), (os, calls)):
    for name in names:
        if hasattr(owner, name):
            delattr(owner, name)
"""
RUN = """
import sys
from packager.cli.command import main
sys.exit(main(sys.argv[1:]))
"""
CHECK = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def there(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(packager.__file__).parent.parent)} | environment,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(maps: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("elsewhere") / "né.bundle"
    succeeded(there(RUN, "build", maps("llama"), "--profile", "laptop-16gb", "--no-validate", "-o", out))
    return out


def test_plan(maps: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "plan.json"
    succeeded(there(RUN, "plan", maps("llama"), "--profile", "laptop-16gb", "-o", out))
    assert json.loads(out.read_text(encoding="utf-8"))["choices"]
    succeeded(there(RUN, "plan", maps("llama"), "--profile", "laptop-16gb", "-o", out))
    assert [path.name for path in out.parent.iterdir()] == ["plan.json"]


def test_build_and_run(built: Path) -> None:
    assert [path.name for path in built.parent.iterdir()] == [built.name]
    assert succeeded(there(RUN, "run", built, "--prompt", "Name three things.", "--tokens", "8"))


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_a_bundles_own_check(built: Path, locale: str) -> None:
    done = there(CHECK, built / "check.py", built, LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    said = json.loads(succeeded(done))
    assert said["passed"] is True
    # Nothing here tells the peak: it is not checked, and nothing is made up.
    assert said["memory"] == {}


def test_a_bundles_own_check_in_a_locale_without_letters(built: Path, tmp_path: Path) -> None:
    """As the user runs it, on this system, with a model and a folder that have an accent."""
    bundle = Path(shutil.copytree(built, tmp_path / "né.bundle"))
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-I", bundle / "check.py", "--json", tmp_path / "é.json"],
        capture_output=True,
        check=False,
        env=plain,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    kept = json.loads((tmp_path / "é.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout.decode("ascii")) == kept
    assert kept["memory"]["peak_bytes"] > 0
