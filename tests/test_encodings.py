"""Text is UTF-8 wherever this package opens it, whatever the locale is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import packager

ROOT = Path(packager.__file__).parent
FILES = sorted([*ROOT.rglob("*.py"), *(ROOT.parent / "benchmarks").glob("*.py")])


def speaks_for_itself(call: ast.Call) -> bool:
    """Whether a call opens bytes, or says its encoding."""
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in words:
        return True
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    match name:
        case "read_text":
            return bool(call.args)
        case "write_text":
            return len(call.args) > 1 or isinstance(call.func, ast.Name)  # ours takes no encoding
        case "open" | "fdopen" | "NamedTemporaryFile" | "TemporaryFile":
            modes = [*call.args[:2], *([words["mode"]] if "mode" in words else [])]
            if name.endswith("TemporaryFile") and not modes:
                return True
            plain = {"os", "webbrowser", "mmap", "Workspace"}
            if name == "open" and isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in plain:
                return True
            return any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        case "run" | "Popen" | "check_output":
            return not any(key in ("text", "universal_newlines") for key in words)
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT.parent).as_posix())
def test_text_is_opened_as_utf_8(path: Path) -> None:
    silent = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and not speaks_for_itself(node)
    ]
    assert not silent, f"{path}: no encoding in lines {silent}"
