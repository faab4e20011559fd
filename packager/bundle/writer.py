"""Writing a bundle: a folder that onnxruntime-genai loads as it is, with a manifest of everything in it.

`stage` writes a plan's bundle once; what comes to it later (tuned scales, a golden file, measurements) changes the
value it returned, and `write_manifest` puts that beside the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from packager.bundle.folder import GRAPH_FILE, MANIFEST_FILE, UNLISTED, BundleFolder, role_of
from packager.bundle.manifest import (
    SCHEMA,
    Bounds,
    BundleFile,
    BundleUnit,
    Manifest,
    Polish,
    Predicted,
    files_hash,
)
from packager.bundle.opening import OpenedBundle
from packager.bundle.weights import overwrite_scales
from packager.errors import ArtifactError
from packager.graph.surgery import GraphOptions, Placement, write_model
from packager.io.files import dump_json, read_json, sha256_file, sha256_json, write_text
from packager.planning.kv_cache_choice import CACHE_TEXTS
from packager.planning.plan import Plan, form_of
from packager.profile import INT8, DeviceProfile
from packager.runtime import device_check
from packager.runtime.genai_config import GenaiBounds, bounded_config
from packager.scoremap.opening import OpenedMap


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a bundle is made of: a map, a plan of it, and the device that was planned for."""

    source: OpenedMap
    plan: Plan
    profile: DeviceProfile


def stage(recipe: Recipe, root: Path) -> OpenedBundle:
    """Write everything of a bundle but its manifest into folder `root`, and hash it once."""
    write_contents(recipe, root)
    folder = BundleFolder(root=root)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = tuple(_listed(folder, name) for name in names if name not in UNLISTED)
    return OpenedBundle(folder=folder, manifest=_manifest(recipe, files))


def write_contents(recipe: Recipe, root: Path) -> None:
    """Everything that a runtime needs of a bundle, and how it was made, into folder `root`: a copy of chosen bytes."""
    source, plan, profile, folder = recipe.source, recipe.plan, recipe.profile, BundleFolder(root=root)
    skeleton = source.folder.skeleton(profile.provider)
    source.check_files()
    folder.graph.parent.mkdir(parents=True)
    options = GraphOptions(
        context_tokens=plan.context_tokens,
        accuracy_level=profile.accuracy_level,
        cache_scales=source.folder.reference.kv_scales() if plan.cache == INT8 else None,
    )
    written = write_model(skeleton.graph, _placements(source, plan), options, folder.graph)
    if sum(written.values()) != plan.file_bytes:
        raise ArtifactError(f"wrote {sum(written.values())} bytes of weights, the plan said {plan.file_bytes}")
    for path in source.folder.side_files():
        shutil.copyfile(path, root / path.name)
    _amend_config(folder.config, plan.cache)
    bounds = GenaiBounds(
        graph_file=GRAPH_FILE,
        context_tokens=plan.context_tokens,
        chunk_tokens=source.geometry.chunk_tokens(profile.chunk_tokens, plan.context_tokens),
        kv_cache=plan.cache,
        threads=profile.threads,
    )
    write_text(folder.genai_config, json.dumps(bounded_config(read_json(skeleton.genai_config), bounds), indent=2))
    write_text(folder.plan, dump_json(plan.to_dict()))
    write_text(folder.profile, profile.toml)
    shutil.copyfile(source.folder.reference.path, folder.reference.path)
    shutil.copyfile(Path(device_check.__file__), folder.check)
    write_text(folder.card, _card(source, plan))


def with_scales(bundle: OpenedBundle, scales: Mapping[str, NDArray[np.generic]], polish: Polish) -> OpenedBundle:
    """The bundle with tuned scales (unit → the scales of its blocks) in the place of its own: of the files, only the
    weights change, and of them only these bytes."""
    if scales:
        overwrite_scales(bundle.folder.graph, scales)
    weights = bundle.folder.weights.relative_to(bundle.folder.root).as_posix()
    return _with_file(replace(bundle, manifest=replace(bundle.manifest, polish=polish)), weights)


def with_golden(bundle: OpenedBundle) -> OpenedBundle:
    """The bundle with the golden file that was written into its folder."""
    return _with_file(bundle, bundle.folder.golden.relative_to(bundle.folder.root).as_posix())


def write_manifest(bundle: OpenedBundle) -> None:
    """`packager.json` and SHA256SUMS."""
    folder, manifest = bundle.folder, bundle.manifest
    write_text(folder.manifest, dump_json(manifest.to_dict()))
    sums = "".join(f"{entry.sha256}  {entry.path}\n" for entry in manifest.files)
    write_text(folder.sums, sums + f"{sha256_file(folder.manifest)}  {MANIFEST_FILE}\n")


def _placements(source: OpenedMap, plan: Plan) -> Iterable[Placement]:
    """Every unit in its chosen form, with where its bytes lie in the map's store."""
    store = source.folder.open_store()
    for unit in source.scoremap.units:
        form = form_of(plan, unit)
        yield Placement(
            name=unit.name,
            matrix=unit.matrix,
            start=unit.start,
            tied=unit.kind == "tied",
            rows=unit.rows,
            cols=unit.cols,
            form=form,
            regions=store.placement_regions(unit.name, form, unit.rows, unit.cols),
        )


def _amend_config(path: Path, cache: str) -> None:
    config = read_json(path)
    kind = "int8" if cache == INT8 else "float32"
    config["transformers.js_config"] = {"use_external_data_format": {Path(GRAPH_FILE).name: 1}, "kv_cache_dtype": kind}
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False))


def _listed(folder: BundleFolder, name: str) -> BundleFile:
    path = folder.root / name
    return BundleFile(path=name, role=role_of(name), bytes=path.stat().st_size, sha256=sha256_file(path))


def _with_file(bundle: OpenedBundle, name: str) -> OpenedBundle:
    """The bundle with the file of that name as it lies there now; the others are as they were listed."""
    others = [entry for entry in bundle.manifest.files if entry.path != name]
    files = tuple(sorted([*others, _listed(bundle.folder, name)], key=lambda entry: entry.path))
    return replace(bundle, manifest=replace(bundle.manifest, files=files, bundle_sha256=files_hash(files)))


def _manifest(recipe: Recipe, files: tuple[BundleFile, ...]) -> Manifest:
    source, plan = recipe.source, recipe.plan
    return Manifest(
        schema=SCHEMA,
        bundle_sha256=files_hash(files),
        files=files,
        model=source.identity.model,
        map_sha256=plan.map_sha256,
        plan_sha256=sha256_json(plan.to_dict()),
        profile=plan.profile,
        profile_sha256=plan.profile_sha256,
        units=tuple(BundleUnit(**asdict(unit), form=plan.choices[unit.name]) for unit in source.scoremap.units),
        bounds=Bounds(
            budget_bytes=plan.budget_bytes,
            context_tokens=plan.context_tokens,
            prompt_tokens=plan.prompt_tokens,
            vocabulary=source.geometry.vocab,
            provider=recipe.profile.provider,
        ),
        predicted=Predicted(
            peak_bytes=plan.peak_bytes, loss_nats=plan.loss_nats, file_bytes=plan.file_bytes, memory=plan.memory
        ),
        versions={name: version(name) for name in ("edge-packager", "onnxruntime", "onnxruntime-genai", "onnx-ir")},
        cache=plan.cache,
    )


def _card(source: OpenedMap, plan: Plan) -> str:
    model = source.identity.model
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
from check import decode, encode, text_rules  # the bundle's own check.py

model = og.Model(".")
tokenizer, rules = og.Tokenizer(model), text_rules()
params = og.GeneratorParams(model)
params.set_search_options(max_length={plan.context_tokens}, do_sample=False)
generator = og.Generator(model, params)
ids = encode(tokenizer, "The three most important things are", rules)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(decode(tokenizer, generator.get_sequence(0)[len(ids):], rules))
```

A text of a chat template has its special tokens already: `encode(tokenizer, text, rules, bare=False)`.
"""
