"""Bundles: a folder that onnxruntime-genai loads as it is, with a manifest of everything in it.

genai_config.json  config.json  generation_config.json  tokenizer files  chat_template.jinja
onnx/model_q4.onnx  onnx/model_q4.onnx_data     the graph and its weights
packager.json                                   manifest: files, sources, options, predicted and measured
plan.json  profile.toml  reference.safetensors  how it was made, and the vectors a torch reference needs
golden.safetensors  check.py                    the device's acceptance test
README.md  LICENSE  SHA256SUMS
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packager.bundle.manifest import (
    SCHEMA,
    Bounds,
    BundleFile,
    BundleUnit,
    Manifest,
    Predicted,
    files_hash,
    parse_manifest,
)
from packager.errors import ArtifactError
from packager.graph.kv_cache_codes import read_scales
from packager.graph.surgery import GraphOptions, Placement, write_model
from packager.io.files import (
    dump_json,
    inner_path,
    read_json,
    refuse_stray_links,
    sha256_file,
    sha256_json,
    write_text,
)
from packager.io.outputs import Artefact
from packager.io.safetensors_ranges import read_header, sha256_region
from packager.planning.kv_cache_choice import CACHE_TEXTS
from packager.planning.plan import PLAN_FILE, LoadedMap, Plan, form_of
from packager.profile import INT8, DeviceProfile
from packager.runtime import device_check
from packager.scoremap.identity import check_files
from packager.scoremap.model import DIGESTS_FILE, STORE_FILE

MANIFEST_FILE = "packager.json"
GRAPH_FILE = "onnx/model_q4.onnx"
GOLDEN_FILE = "golden.safetensors"
REFERENCE_FILE = "reference.safetensors"
CHECK_FILE = "check.py"
SUMS_FILE = "SHA256SUMS"
REPORT_FILES = ("report.json", "report.html")
BUNDLE = Artefact(
    noun="bundle",
    marker=MANIFEST_FILE,
    keys=("files",),
    listed=lambda manifest: [entry["path"] for entry in manifest["files"]],
    known=frozenset({SUMS_FILE, *REPORT_FILES}),
)
_ROLES = {
    GRAPH_FILE: "graph",
    f"{GRAPH_FILE}_data": "weights",
    GOLDEN_FILE: "golden",
    REFERENCE_FILE: "reference",
    CHECK_FILE: "check",
    PLAN_FILE: "plan",
    "config.json": "config",
}


def write_contents(
    loaded: LoadedMap, plan: Plan, profile: DeviceProfile, out: Path, polished: Path | None = None
) -> None:
    """Everything of a bundle but its golden file and manifest, into folder `out`. A copy of chosen bytes, with the
    scales in safetensors file `polished` (`unit|scales`) in the place of the store's where there are any."""
    skeleton = loaded.folder / "skeleton" / profile.provider
    if not skeleton.is_dir():
        raise ArtifactError(
            f"{loaded.folder} has no graph for {profile.provider}: score the model again with --provider "
            f"{profile.provider}"
        )
    check_files(loaded.folder, loaded.identity)
    (out / "onnx").mkdir(parents=True)
    scales = read_scales(loaded.folder / REFERENCE_FILE) if plan.cache == INT8 else None
    options = GraphOptions(
        context_tokens=plan.context_tokens, accuracy_level=profile.accuracy_level, cache_scales=scales
    )
    written = write_model(skeleton / "graph.onnx", placements(loaded, plan, polished), options, out / GRAPH_FILE)
    if sum(written.values()) != plan.file_bytes:
        raise ArtifactError(f"wrote {sum(written.values())} bytes of weights, the plan said {plan.file_bytes}")
    for path in sorted((loaded.folder / "model").iterdir()):
        shutil.copyfile(path, out / path.name)
    _amend_config(out / "config.json", plan.cache)
    genai = genai_config(read_json(skeleton / "genai_config.json"), plan, profile)
    write_text(out / "genai_config.json", json.dumps(genai, indent=2))
    write_text(out / PLAN_FILE, dump_json(plan.to_dict()))
    write_text(out / "profile.toml", profile.toml)
    shutil.copyfile(loaded.folder / REFERENCE_FILE, out / REFERENCE_FILE)
    shutil.copyfile(Path(device_check.__file__), out / CHECK_FILE)
    write_text(out / "README.md", _card(loaded, plan))


def placements(loaded: LoadedMap, plan: Plan, polished: Path | None = None) -> Iterable[Placement]:
    """Every unit in its chosen form, with where its bytes lie: in the map's store, or scales in `polished`."""
    tensors, _ = read_header(loaded.folder / STORE_FILE)
    tuned = read_header(polished)[0] if polished else {}
    digests = read_json(loaded.folder / DIGESTS_FILE)
    for unit in loaded.scoremap.units:
        form = form_of(plan, unit)
        regions = {}
        for name in form.tensors(unit.rows, unit.cols):
            key = f"{unit.name}|{form.label}|{name}"
            if key not in tensors:
                raise ArtifactError(
                    f"{loaded.folder / STORE_FILE} has no {key!r}: store and map do not belong together, score the "
                    f"model again"
                )
            regions[name] = tensors[key].region
            if sha256_region(regions[name]) != digests.get(key):
                raise ArtifactError(
                    f"{loaded.folder / STORE_FILE}: the bytes of {key!r} are not those that were scored: the store is "
                    f"damaged, score the model again"
                )
        if f"{unit.name}|scales" in tuned:
            regions["scales"] = tuned[f"{unit.name}|scales"].region
        yield Placement(
            name=unit.name,
            matrix=unit.matrix,
            start=unit.start,
            tied=unit.kind == "tied",
            rows=unit.rows,
            cols=unit.cols,
            form=form,
            regions=regions,
        )


def genai_config(skeleton: Mapping[str, Any], plan: Plan, profile: DeviceProfile) -> dict[str, Any]:
    """The runtime's configuration: the exporter's, bounded to the plan's context and the profile's chunk.

    The runtime allocates `max_length` at once, so the model's full context would be memory for nothing. Prefill in
    chunks bounds the activations (and on CPU is faster). Unknown keys are parse errors there: ours stay out.
    """
    config: dict[str, Any] = json.loads(json.dumps(skeleton))
    decoder = config["model"]["decoder"]
    decoder["filename"] = GRAPH_FILE
    config["model"]["context_length"] = plan.context_tokens
    config["search"]["max_length"] = plan.context_tokens
    config["search"]["chunk_size"] = profile.chunk_tokens
    if plan.cache == INT8:
        # A pattern of allocations is kept from the first chunk and its block held beside what deeper chunks need
        # (docs/memory.md).
        decoder["session_options"]["enable_mem_pattern"] = False
    if profile.threads:
        decoder["session_options"]["intra_op_num_threads"] = profile.threads
    return config


def _amend_config(path: Path, cache: str) -> None:
    config = read_json(path)
    kind = "int8" if cache == INT8 else "float32"
    config["transformers.js_config"] = {"use_external_data_format": {Path(GRAPH_FILE).name: 1}, "kv_cache_dtype": kind}
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False))


def write_manifest(
    out: Path,
    loaded: LoadedMap,
    plan: Plan,
    provider: str,
    *,
    measured: Mapping[str, Any] | None,
    polish: Mapping[str, Any] | None = None,
) -> Manifest:
    """`packager.json` and SHA256SUMS over what lies in `out`. Returns the manifest."""
    skip = {MANIFEST_FILE, SUMS_FILE, *REPORT_FILES}
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    files = tuple(
        BundleFile(
            path=name, role=_ROLES.get(name, "side"), bytes=(out / name).stat().st_size, sha256=sha256_file(out / name)
        )
        for name in names
        if name not in skip
    )
    manifest = Manifest(
        schema=SCHEMA,
        bundle_sha256=files_hash(files),
        files=files,
        model=loaded.identity.model,
        map_sha256=plan.map_sha256,
        plan_sha256=sha256_json(plan.to_dict()),
        profile=plan.profile,
        profile_sha256=plan.profile_sha256,
        units=tuple(BundleUnit(**asdict(unit), form=plan.choices[unit.name]) for unit in loaded.scoremap.units),
        bounds=Bounds(
            budget_bytes=plan.budget_bytes,
            context_tokens=plan.context_tokens,
            prompt_tokens=plan.prompt_tokens,
            vocabulary=loaded.geometry.vocab,
            provider=provider,
        ),
        predicted=Predicted(
            peak_bytes=plan.peak_bytes, loss_nats=plan.loss_nats, file_bytes=plan.file_bytes, memory=plan.memory
        ),
        versions={name: version(name) for name in ("edge-packager", "onnxruntime", "onnxruntime-genai", "onnx-ir")},
        measured=dict(measured) if measured is not None else None,
        polish=dict(polish) if polish is not None else None,
        cache=plan.cache,
    )
    write_text(out / MANIFEST_FILE, dump_json(manifest.to_dict()))
    sums = "".join(f"{entry.sha256}  {entry.path}\n" for entry in files)
    write_text(out / SUMS_FILE, sums + f"{sha256_file(out / MANIFEST_FILE)}  {MANIFEST_FILE}\n")
    return manifest


def open_bundle(root: Path) -> Manifest:
    """The manifest of the bundle in `root`, after every file was found with its size and hash. Nothing is executed."""
    path = root / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{root} is not a bundle ({MANIFEST_FILE} is missing): make one with 'packager pack' or 'packager build'"
        )
    manifest = parse_manifest(read_json(path), str(path))
    refuse_stray_links(root, [*(entry.path for entry in manifest.files), MANIFEST_FILE, SUMS_FILE, *REPORT_FILES])
    for entry in manifest.files:
        file = inner_path(root, entry.path)
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: the bundle is incomplete, build it again")
        size = file.stat().st_size
        if size != entry.bytes or sha256_file(file) != entry.sha256:
            raise ArtifactError(
                f"{file} is not the file its manifest names (expected {entry.bytes} bytes, found {size}): the bundle "
                f"was altered or damaged"
            )
    return manifest


def _card(loaded: LoadedMap, plan: Plan) -> str:
    model = loaded.identity.model
    kind = f"{model.architecture}, {model.parameters / 1e6:.0f} M parameters"
    return f"""# {model.name}, packed for {plan.profile}

| | |
|---|---|
| source model | {model.source} ({kind}, sha256 {model.sha256[:16]}…) |
| licence | that of the source model; see LICENSE where the source has one |
| weights | {plan.file_bytes:,} bytes, {plan.ratio:.1%} of the float16 model |
| context | {plan.context_tokens} tokens, prompt and answer together |
| key/value cache | {CACHE_TEXTS[plan.cache]} |
| budget | {plan.budget_bytes:,} bytes for the whole process; predicted peak {plan.peak_bytes:,} |
| quality | predicted rise of the loss {plan.loss_nats:.4f} nats per token over the source model |

`report.json`, where it lies here, says what was measured. To run:

    pip install onnxruntime-genai
    python check.py                  # hashes, golden logits, memory and speed on this device

```python
import onnxruntime_genai as og
model = og.Model(".")
tokenizer = og.Tokenizer(model)
```
"""
