"""The house's order: what each module may import, and that planning stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import packager

ROOT = Path(packager.__file__).parent
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
HEAVY = {
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime_genai",
    "onnx_ir",
    "onnx",
    "optimum",
    "accelerate",
    "huggingface_hub",
}
ROOMS = [
    "errors",
    "sizes",
    "progress",
    "io",
    "profile",
    "forms",
    "graph",
    "runtime",
    "memory",
    "scoremap",
    "planning",
    "source",
    "bundle",
    "scoring",
    "validation",
    "pipeline",
    "api",
    "cli",
    "__main__",
]
"""From the ground up: a room may import only from itself and from those before it. Every file is in one of them."""


def imported_at_module_level(path: Path) -> set[str]:
    """Full names of the modules that importing `path` imports; what is under TYPE_CHECKING or in a function is not."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            match node:
                case ast.Import(names=names):
                    found.update(alias.name for alias in names)
                case ast.ImportFrom(module=str(module), level=0):
                    found.add(module)
                case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=rest):
                    visit(rest)
                case ast.If(body=body, orelse=rest):
                    visit([*body, *rest])
                case ast.Try(body=body, orelse=rest, finalbody=last):
                    visit([*body, *rest, *last])
                case ast.ClassDef(body=body) | ast.With(body=body):
                    visit(body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def room_of(module: str) -> str:
    """The room of `packager.ROOM…`; the package itself, where nothing else is named, is what `api` shows."""
    return module.split(".")[1] if "." in module else "api"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    """Those inside functions too: a late import saves time, it does not turn an arrow round."""
    room = name.removesuffix(".py").partition("/")[0].replace("__init__", "api")
    assert room in ROOMS, f"{name} is in no room of the house"
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "packager":
            whole = [f"packager.{alias.name}" for alias in node.names] if node.module == "packager" else [node.module]
            imported |= {room_of(module) for module in whole if module != "packager.__version__"}
        elif isinstance(node, ast.Import):
            imported |= {room_of(alias.name) for alias in node.names if alias.name.partition(".")[0] == "packager"}
    assert imported <= allowed, f"{name} imports upwards: {sorted(imported - allowed)}"


def test_the_list_of_rooms_names_what_is_there() -> None:
    there = {name.removesuffix(".py").partition("/")[0] for name in MODULES} - {"__init__"}
    assert there == set(ROOMS)
    assert len({path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")} | there) <= 22


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_absolute_and_no_test_code_is_used(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(
                module.partition(".")[0] in {"pickle", "pytest", "hypothesis", "tests"} for module in modules
            )


def test_the_exporter_is_known_in_one_file() -> None:
    users = [name for name in MODULES if "onnxruntime_genai.models" in (ROOT / name).read_text(encoding="utf-8")]
    assert users == ["graph/skeleton.py"]


def test_remote_code_is_never_trusted() -> None:
    for name in MODULES:
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False, name


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}: {node.name}"
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    overload = any(
                        isinstance(decorator, ast.Name) and decorator.id == "property"
                        for decorator in inner.decorator_list
                    )
                    assert ast.get_docstring(inner) or overload or inner.name == "to_dict", (
                        f"{name}: {node.name}.{inner.name}"
                    )


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import packager.planning.plan, packager.cli.render, packager.cli.command",
        "import packager.cli.command\ntry: packager.cli.command.main(['plan', '--help'])\nexcept SystemExit as "
        "stopped: assert not stopped.code",
        "import packager.cli.command; assert packager.cli.command.main(['profiles']) == 0",
        "import packager.cli.command; assert packager.cli.command.main(['plan', '/nowhere', '--profile', "
        "'edge-box-256mb']) == 1",
    ],
)
def test_planning_loads_nothing_heavy(code: str) -> None:
    out = run_python(f"{code}\nimport sys\nprint('\\n' + ' '.join(sorted({HEAVY!r} & set(sys.modules))))")
    assert out.splitlines()[-1] == ""


@pytest.mark.parametrize("verb", ["plan", "curve"])
def test_a_plan_of_a_real_map_loads_nothing_heavy(verb: str, maps: Callable[[str], Path]) -> None:
    out = run_python(
        f"import sys, packager.cli.command; assert packager.cli.command.main([{verb!r}, {str(maps('llama'))!r}, "
        f"'--profile', 'edge-box-256mb', '--json']) == 0\n"
        f"print('\\n' + ' '.join(sorted({HEAVY!r} & set(sys.modules))))"
    )
    assert out.splitlines()[-1] == ""


def test_the_error_tree_is_as_drawn() -> None:
    from packager import errors

    drawn = set(re.findall(r"^[├└─│ ]*([A-Z][A-Za-z]*Error) ", errors.__doc__ or "", re.MULTILINE))
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert drawn == defined
    assert all(issubclass(getattr(errors, name), errors.PackagerError) for name in defined)
