"""Every file of a map, written into its folder in one place."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from safetensors.numpy import save_file

from packager.graph.kv_cache_codes import cache_facts, state_bytes
from packager.io.files import dump_json, read_json, sha256_file, write_text
from packager.io.safetensors_ranges import join, sha256_region
from packager.memory.geometry import Geometry, read_geometry
from packager.scoremap.folder import MapFolder, store_key
from packager.scoremap.identity import CalibrationIdentity, Losses, MapIdentity, ModelIdentity
from packager.scoremap.model import SCHEMA, ScoreMap, map_tensors
from packager.scoremap.reference import HeldOut
from packager.scoring.bench import Bench, Subject
from packager.scoring.correction import Measured
from packager.scoring.kv_cache_price import KvCachePrice
from packager.scoring.workspace import Workspace
from packager.source.checkpoint import vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class MapContent:
    """All that a map is made of: the bench with the finished options, what was measured, what 8-bit caches cost."""

    bench: Bench
    measured: Measured
    kv_cache: KvCachePrice


def write_map(folder: Path, content: MapContent) -> MapIdentity:
    """Write the map's files into the empty `folder`, `map.json` last, with the hash of every other."""
    subject, paths = content.bench.subject, MapFolder(root=folder)
    _write_store(paths, content.bench.work, content.measured.scoremap)
    arrays, metadata = map_tensors(content.measured.scoremap)
    save_file(arrays, paths.scoremap, metadata=metadata)
    shutil.copytree(MapFolder(root=content.bench.work.folder).skeletons, paths.skeletons)
    subject.checkpoint.save_side_files(paths.side_folder, subject.config, subject.runtime_tokenizer)
    _write_reference(paths, content)
    identity = _identity(paths, content)
    write_text(paths.identity, dump_json(identity.to_dict()))
    return identity


def _write_store(folder: MapFolder, work: Workspace, scoremap: ScoreMap) -> None:
    """Join what the map needs of the units' files into its one store, with a digest of every tensor."""
    entries = [
        (store_key(unit.name, form, name), tensor)
        for unit, chain in zip(scoremap.units, scoremap.options, strict=True)
        for (form, name), tensor in work.stored_tensors(unit, chain).items()
    ]
    join(entries, folder.store)
    write_text(folder.digests, dump_json({key: sha256_region(tensor.region) for key, tensor in entries}))


def _write_reference(folder: MapFolder, content: MapContent) -> None:
    """The model's vectors, the held-out windows with the loss of their tokens, and the scales of 8-bit caches."""
    folder.reference.write(
        {name: tensor.numpy() for name, tensor in vectors(content.bench.subject.model)},
        HeldOut(windows=content.bench.heldout.numpy(), source_nats=content.measured.token_nats.float().cpu().numpy()),
        {layer: (key.numpy(), value.numpy()) for layer, (key, value) in content.kv_cache.steps.items()},
    )


def _identity(folder: MapFolder, content: MapContent) -> MapIdentity:
    text, measured = content.bench.text, content.measured
    return MapIdentity(
        schema=SCHEMA,
        model=_model_identity(content.bench.subject),
        geometry=_geometry(folder, content),
        calibration=CalibrationIdentity(text=text.description, sha256=text.sha256, tokens=text.windows.numel()),
        losses=Losses(heldout_nats=measured.heldout_nats),
        probes=measured.probes,
        anchors=measured.anchors,
        settings=content.bench.settings,
        versions={name: version(name) for name in ("torch", "transformers", "onnxruntime-genai", "edge-packager")},
        files=_hashes(folder.root),
        int8_cache=content.kv_cache.score,
    )


def _model_identity(subject: Subject) -> ModelIdentity:
    source, config = subject.checkpoint.source, subject.config
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    return ModelIdentity(
        name=subject.checkpoint.name,
        source=Path(source).name if Path(source).is_absolute() else source,
        sha256=subject.sha256,
        architecture=(config.architectures or ["?"])[0],
        parameters=parameters,
        float16_bytes=2 * parameters,
        max_context_tokens=int(config.max_position_embeddings),
    )


def _geometry(folder: MapFolder, content: MapContent) -> Geometry:
    provider = content.bench.settings.provider
    genai = read_json(folder.skeleton(provider).genai_config)
    graph = ir.load(content.bench.skeleton.graph).graph
    kernels = vectors(content.bench.subject.model)
    return read_geometry(
        content.bench.subject.config,
        nodes=content.bench.skeleton.nodes,
        tokenizer=folder.tokenizer,
        genai=genai,
        whole_prompt_tokens=content.bench.subject.whole_prompt_tokens,
        cacheless_layers=content.bench.subject.config.num_hidden_layers - len(cache_facts(graph, provider).layers),
        hybrid_bytes=2 * state_bytes(graph) + sum(kernel.nbytes for _, kernel in kernels if kernel.dim() > 1),
    )


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
