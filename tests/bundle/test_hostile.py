"""Bundles made to harm: each is refused before anything of it is loaded, by the packager and by check.py, in words."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from signing import sign

from packager.bundle.opening import open_bundle
from packager.bundle.writer import Recipe, stage, write_manifest
from packager.errors import ArtifactError
from packager.io.files import sha256_file
from packager.planning.plan import Request
from packager.profile import load_profile
from packager.runtime import device_check
from packager.scoremap.opening import open_map

GENAI, GRAPH = "genai_config.json", "onnx/model_q4.onnx"


@pytest.fixture(scope="module")
def honest(maps: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("honest") / "pico.bundle"
    profile = dataclasses.replace(load_profile("edge-box-256mb"), context_tokens=64)
    source = open_map(maps("llama"))
    plan = Request(profile=profile, cache="float").plan(source)
    write_manifest(stage(Recipe(source=source, plan=plan, profile=profile), root))
    return root


@pytest.fixture
def bundle(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "b"))


def edited(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refusal(root: Path) -> str:
    """The words with which a bundle is refused, the folder's path left out."""
    with pytest.raises(ArtifactError) as caught:
        open_bundle(root)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{root}/", "").replace(str(root), "BUNDLE")


def test_an_honest_bundle_opens(bundle: Path) -> None:
    sign(bundle)
    assert open_bundle(bundle).manifest.bounds.context_tokens == 64


def _options(config: Any) -> Any:
    return config["model"]["decoder"]["session_options"]


SETTINGS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a library": (
        lambda config: _options(config).update(custom_ops_library="/tmp/evil.so"),
        "model: decoder: session_options: 'custom_ops_library' is no setting that a bundle may have",
    ),
    "a profile written anywhere": (
        lambda config: _options(config).update(enable_profiling="/home/user/x"),
        "model: decoder: session_options: 'enable_profiling' is no setting that a bundle may have",
    ),
    "a graph written anywhere": (
        lambda config: _options(config).update(optimized_model_filepath="/home/user/x"),
        "model: decoder: session_options: 'optimized_model_filepath' is no setting that a bundle may have",
    ),
    "entries of the session": (
        lambda config: _options(config).update({"session.load_model_format": "ORT"}),
        "model: decoder: session_options: 'session.load_model_format' is no setting that a bundle may have",
    ),
    "a provider's library": (
        lambda config: _options(config).update(provider_options=[{"cuda": {"library": "x.so"}}]),
        "model: decoder: session_options: provider_options is list of 1: expected known options of one provider",
    ),
    "a graph outside": (
        lambda config: config["model"]["decoder"].update(filename="../evil.onnx"),
        "model: decoder: filename is '../evil.onnx': expected onnx/model_q4.onnx",
    ),
    "a format that writes": (
        lambda config: config["model"]["decoder"]["inputs"].update(past_key_names="past.%n.key"),
        "model: decoder: inputs: past_key_names is 'past.%n.key': expected names of inputs or outputs with one %d for "
        "the layer",
    ),
    "a second model": (
        lambda config: config.update(speculative={"max_draft_tokens": 3}),
        "'speculative' is no setting that a bundle may have",
    ),
    "a vision tower": (
        lambda config: config["model"].update(vision={"filename": "x.onnx"}),
        "model: 'vision' is no setting that a bundle may have",
    ),
    "a text for a number": (
        lambda config: config["search"].update(top_k="50"),
        "search: top_k is '50': expected a whole number from 0 to 2147483647",
    ),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_no_bundle_has_are_refused(bundle: Path, kind: str) -> None:
    change, words = SETTINGS[kind]
    edited(bundle / GENAI, change)
    assert refusal(bundle).startswith("genai_config.json is not the file its manifest names")
    sign(bundle)
    assert refusal(bundle) == f"genai_config.json: {words}: nothing of it was loaded"


def test_a_longer_context_than_the_manifest_promises_is_refused(bundle: Path) -> None:
    edited(bundle / GENAI, lambda config: config["search"].update(max_length=4096))
    sign(bundle)
    assert refusal(bundle) == (
        "genai_config.json: max_length is 4096: expected the manifest's context of 64 tokens: nothing of it was loaded"
    )
    edited(bundle / GENAI, lambda config: config["search"].pop("max_length"))
    sign(bundle)
    assert "max_length is None: expected the manifest's context" in refusal(bundle)


def test_a_key_that_stands_twice_is_refused(bundle: Path) -> None:
    text = (bundle / GENAI).read_text()
    (bundle / GENAI).write_text(text.replace('"search":', '"search": {"max_length": 1}, "search":'))
    sign(bundle)
    assert refusal(bundle) == "genai_config.json is not readable JSON (a key stands twice): nothing of it was loaded"


def _node(model: onnx.ModelProto, operator: str, domain: str = "") -> None:
    model.graph.node[0].op_type, model.graph.node[0].domain = operator, domain


def _external(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = next(item for item in model.graph.initializer if item.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def _nested(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_node("EPContext", [], [], domain="com.microsoft")
    branch = onnx.helper.make_graph([inner], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], [], then_branch=branch, else_branch=branch))


def _constant(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "a domain of another's": (
        lambda model: _node(model, "Add", "evil.ops"),
        "holds the operator 'evil.ops.Add', which no bundle has",
    ),
    "a compiled context": (
        lambda model: _node(model, "EPContext", "com.microsoft"),
        "holds the operator 'com.microsoft.EPContext', which no bundle has",
    ),
    "Python": (lambda model: _node(model, "PyOp"), "holds the operator 'ai.onnx.PyOp', which no bundle has"),
    "a loop": (lambda model: _node(model, "Loop"), "holds the operator 'ai.onnx.Loop', which no bundle has"),
    "an operator within a branch": (_nested, "holds the operator 'com.microsoft.EPContext', which no bundle has"),
    "data outside": (
        lambda model: _external(model, "location", "../../etc/passwd"),
        "takes data from '../../etc/passwd': expected model_q4.onnx_data, beside it",
    ),
    "data outside within a constant": (
        _constant,
        "takes data from '/etc/passwd': expected model_q4.onnx_data, beside it",
    ),
    "data beyond the end": (
        lambda model: _external(model, "offset", "99999999999"),
        "takes data from beyond the end of model_q4.onnx_data",
    ),
    "a negative place": (
        lambda model: _external(model, "offset", "-8"),
        "takes data from beyond the end of model_q4.onnx_data",
    ),
    "functions": (
        lambda model: model.functions.add(name="f", domain="x").node.add(op_type="Add"),  # type: ignore[func-returns-value]
        "holds a function of its own, which no bundle has",
    ),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs_that_do_more_than_reckon_are_refused(bundle: Path, kind: str) -> None:
    change, words = GRAPHS[kind]
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    change(model)
    (bundle / GRAPH).write_bytes(model.SerializeToString())
    sign(bundle)
    assert refusal(bundle) == f"onnx/model_q4.onnx {words}: nothing of it was loaded"


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"])
def test_what_is_no_graph_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / GRAPH).write_bytes(content)
    sign(bundle)
    assert refusal(bundle).startswith("onnx/model_q4.onnx is no ONNX graph (")


EXTRA = "BUNDLE holds what its manifest does not list: {}: take it away; nothing of it was loaded"


@pytest.mark.parametrize(
    "name", ["evil.so", "onnx/other.onnx", "numpy.py", "tokenizer_module.json", "__pycache__/numpy.pyc"]
)
def test_files_that_are_not_listed_are_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("{}")
    assert refusal(bundle) == EXTRA.format(f"'{name}'")


@pytest.mark.parametrize(
    "name", ["report.json", "report.html", ".report.json.writing-x1", "__pycache__/check.c-311.pyc"]
)
def test_reports_and_what_an_import_leaves_may_lie_there(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("{}")
    assert open_bundle(bundle)


def test_a_link_to_elsewhere_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (bundle / "more").symlink_to(tmp_path / "outside")
    assert "more" in refusal(bundle)


def test_a_raised_budget_is_found_by_the_sums_and_by_the_plan(bundle: Path) -> None:
    edited(bundle / "packager.json", lambda manifest: manifest["bounds"].update(budget_bytes=10**15))
    altered = "SHA256SUMS and packager.json do not agree on 'packager.json': one of them was altered"
    assert refusal(bundle) == f"{altered}: nothing of it was loaded"
    sign(bundle)
    assert refusal(bundle) == (
        "packager.json: bounds.budget_bytes is not what plan.json says: one of them was altered, build the bundle again"
    )


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("plan_sha256", lambda manifest: manifest.update(plan_sha256="0" * 64)),
        ("map_sha256", lambda manifest: manifest.update(map_sha256="0" * 64)),
        ("profile_sha256", lambda manifest: manifest.update(profile_sha256="0" * 64)),
        ("predicted.peak_bytes", lambda manifest: manifest["predicted"].update(peak_bytes=1)),
        ("predicted.loss_nats", lambda manifest: manifest["predicted"].update(loss_nats=-0.5)),
        ("cache", lambda manifest: manifest.update(cache="int8")),
        ("units", lambda manifest: manifest["units"][0].update(name="another")),
    ],
)
def test_what_the_manifest_promises_is_held_against_the_plan(
    bundle: Path, field: str, change: Callable[[Any], object]
) -> None:
    edited(bundle / "packager.json", change)
    sign(bundle)
    assert refusal(bundle) == (
        f"packager.json: {field} is not what plan.json says: one of them was altered, build the bundle again"
    )


def test_a_plan_of_another_budget_in_its_place_is_refused(bundle: Path) -> None:
    edited(bundle / "plan.json", lambda plan: plan.update(budget_bytes=10**15))
    sign(bundle)
    assert refusal(bundle) == (
        "packager.json: plan_sha256 is not what plan.json says: one of them was altered, build the bundle again"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + text.splitlines()[0] + "\n", "is no line of sha256sum's, or names a file again"),
        (lambda text: text + "0" * 64 + "  other\n", "and packager.json do not agree on 'other'"),
        (lambda text: "".join(text.splitlines(keepends=True)[1:]), "and packager.json do not agree on 'README.md'"),
        (lambda text: "", "and packager.json do not agree on 'README.md'"),
    ],
)
def test_sums_of_more_or_fewer_files_are_refused(bundle: Path, change: Callable[[str], str], words: str) -> None:
    path = bundle / "SHA256SUMS"
    path.write_text(change(path.read_text()))
    assert words in refusal(bundle)
    path.unlink()
    assert refusal(bundle).startswith("SHA256SUMS cannot be read")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", {"_attn_implementation": "owner/kernel"}, "names code or weights from elsewhere"),
        ("config.json", {"text_config": {"attn_implementation": "owner/kernel"}}, "names code or weights"),
        ("config.json", {"use_kernels": True}, "names code or weights from elsewhere"),
        ("tokenizer_config.json", {"tokenizer_class": "x", "use_kernels": 1}, "names code or weights from elsewhere"),
    ],
)
def test_configurations_that_fetch_code_are_refused(bundle: Path, name: str, content: Any, words: str) -> None:
    edited(bundle / name, lambda config: config.update(content))
    sign(bundle)
    assert words in refusal(bundle)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_module.json", {"custom_library": "x.so"}, "'custom_library' is no setting that a bundle may have"),
        (
            "tokenizer_module.json",
            {"tokenizer_class": "Evil"},
            "tokenizer_class is 'Evil': expected GemmaTokenizer",
        ),
        ("runtime_text.json", {"normalize": "x"}, "normalize is 'x': expected a normal form of Unicode"),
        ("runtime_text.json", [], "expected a JSON object, found list"),
    ],
)
def test_what_the_tokenizer_reads_besides_is_limited(bundle: Path, name: str, content: Any, words: str) -> None:
    (bundle / name).write_text(json.dumps(content))
    edited(
        bundle / "packager.json",
        lambda manifest: manifest["files"].append({"path": name, "role": "side", "bytes": 0, "sha256": ""}),
    )
    sign(bundle)
    assert words in refusal(bundle)


def check(root: Path, *, within: float = 60) -> subprocess.CompletedProcess[str]:
    """The acceptance test on the bundle in `root`; the package's own, as a device would run its copy."""
    command = [sys.executable, "-P", device_check.__file__, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=within)


def test_the_device_check_refuses_before_it_loads(bundle: Path) -> None:
    edited(bundle / GENAI, lambda config: _options(config).update(custom_ops_library="evil.so"))
    sign(bundle)
    done = check(bundle)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"phase: hashes\ncheck.py: {bundle}/genai_config.json: model: decoder: session_options: 'custom_ops_library' "
        f"is no setting that a bundle may have: nothing of it was loaded\n"
    )


def test_the_device_check_loads_nothing_where_a_byte_differs(bundle: Path) -> None:
    with (bundle / "tokenizer.json").open("r+b") as file:
        file.write(b"x")
    done = check(bundle)
    assert done.returncode == 3
    assert [row["passed"] for row in json.loads(done.stdout)["checks"]] == [False]
    assert "phase: load" not in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(files=3),
        lambda manifest: manifest["files"][0].update(path="../x"),
        lambda manifest: manifest["files"][0].update(bytes=-1),
        lambda manifest: manifest["bounds"].update(context_tokens="many"),
    ],
)
def test_the_device_check_refuses_a_malformed_manifest(bundle: Path, change: Callable[[Any], object]) -> None:
    edited(bundle / "packager.json", change)
    done = check(bundle)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"check.py: {bundle}/packager.json")


def test_a_template_that_loops_does_not_hang_the_device_check(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
    (bundle / "chat_template.jinja").write_text(endless)
    edited(bundle / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    monkeypatch.setattr(device_check, "RENDER_SECONDS", 3)
    text, reason = device_check.rendered_chat(bundle, "Hello")
    assert text is None
    assert reason == "took longer than 3 s and was stopped" or "alloc" in reason


def _rehashed(root: Path, name: str) -> None:
    edited(root / "map.json", lambda identity: identity["files"].update({name: sha256_file(root / name)}))


def map_refusal(root: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_map(root).check_files()
    return str(caught.value).replace(f"{root}/", "")


def test_a_map_brings_nothing_hostile_into_a_bundle(maps: Callable[[str], Path], tmp_path: Path) -> None:
    root = Path(shutil.copytree(maps("llama"), tmp_path / "m.map"))
    (root / "model" / "evil.so").write_text("x")
    assert map_refusal(root) == "model/evil.so is not a file that map.json names: take it away"
    (root / "model" / "evil.so").unlink()
    config, graph = "skeleton/cpu/genai_config.json", "skeleton/cpu/graph.onnx"
    kept = (root / config).read_bytes()
    edited(root / config, lambda value: _options(value).update(custom_ops_library="x.so"))
    _rehashed(root, config)
    words = "model: decoder: session_options: 'custom_ops_library' is no setting that a bundle may have"
    assert map_refusal(root) == f"{config}: {words}: nothing of it was loaded"
    (root / config).write_bytes(kept)
    _rehashed(root, config)
    open_map(root).check_files()
    model = onnx.load(root / graph, load_external_data=False)
    _constant(model)
    (root / graph).write_bytes(model.SerializeToString())
    _rehashed(root, graph)
    assert map_refusal(root).startswith(f"{graph} takes data from '/etc/passwd'")
