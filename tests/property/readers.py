"""Every reader of the package with a valid file, and what tells whether it refuses another in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from signing import sign

from packager.bundle.opening import open_bundle
from packager.bundle.writer import Recipe, stage, write_manifest
from packager.errors import PackagerError
from packager.io.files import dump_json, sha256_file
from packager.io.safetensors_ranges import read_header
from packager.planning.plan import Request, read_plan
from packager.profile import load_profile
from packager.runtime import device_check
from packager.scoremap.folder import MapFolder
from packager.scoremap.opening import open_map
from packager.sizes import format_size, parse_size
from packager.source.gguf_header import read_gguf_header
from packager.source.model_folder import read_config
from packager.source.stop_tokens import generation_settings
from packager.source.text_files import fragments
from packager.validation.report import earlier_rounds

MOST_SECONDS = 10.0
"""Of one case. Far more than any needs, for machines that others compute on are slow at random."""
MOST_SAID = 5000
"""Bytes of an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A reader of `file`, in a copy of a folder; `read` raises for a file that is wrong. `prepare` puts right what
    names it by hash, so that the damage is reached."""

    file: Path
    kind: str
    read: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def _planned(root: Path) -> None:
    opened = open_map(root)
    Request(profile=load_profile("edge-box-256mb")).plan(opened)


def _rehash_map(root: Path) -> None:
    path = root / "map.json"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        identity = json.loads(path.read_text())
        identity["files"]["scoremap.safetensors"] = sha256_file(root / "scoremap.safetensors")
        path.write_text(dump_json(identity))


def _sign(root: Path) -> None:
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError):
        sign(root)


def _settings(root: Path) -> None:
    try:
        device_check.refuse_settings(root, 64, "cpu")
    except device_check.RefusedError as error:
        raise PackagerError(str(error)) from None


def _store(root: Path) -> None:
    opened = open_map(root)
    store = opened.folder.open_store()
    unit, chain = opened.scoremap.units[0], opened.scoremap.options[0]
    store.placement_regions(unit.name, chain[-1].form, unit.rows, unit.cols)


def _reference(root: Path) -> None:
    reference = MapFolder(root=root).reference
    reference.held_out()
    reference.vectors()
    reference.kv_scales()


def _size(path: Path) -> None:
    format_size(parse_size(path.read_text(encoding="utf-8", errors="replace"), of_bytes=1 << 30))


def _gguf(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 20)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _report() -> str:
    row = {
        "context_tokens": 64, "cache": "float", "file_bytes": 5, "loss_nats": 0.1, "predicted_bytes": 7,
        "measured_bytes": 8, "reserve_bytes": 0,
    }  # fmt: skip
    return json.dumps({"bundle_sha256": "0" * 64, "rounds": [row, row]})


def every_reader(base: Path, maps: Callable[[str], Path], picos: Callable[[str], Any]) -> dict[str, Reader]:
    """All readers by the name of what they read, over files that are made in folder `base`."""
    root, bundle, model = base / "m.map", base / "b.bundle", base / "model"
    shutil.copytree(maps("llama"), root)
    shutil.copytree(picos("llama").folder, model)
    profile = dataclasses.replace(load_profile("edge-box-256mb"), context_tokens=64)
    source = open_map(root)
    plan = Request(profile=profile, cache="float").plan(source)
    write_manifest(stage(Recipe(source=source, plan=plan, profile=profile), bundle))
    gguf = _gguf(base / "a.gguf")
    texts = {
        "lines.jsonl": '{"text": "one"}\n{"messages": [{"role": "user", "content": "Hi"}]}\n',
        "all.json": '[{"text": "one"}, {"text": "two"}]',
        "table.csv": "text,other\none,1\n",
        "plain.txt": "The first people were there.\n",
        "size": "1.5GiB",
        "report.json": _report(),
    }
    for name, text in texts.items():
        (base / name).write_text(text)
    shutil.copyfile(base / "report.json", bundle / "report.json")
    profile_file = base / "box.toml"
    profile_file.write_text(profile.toml)

    def texts_of(name: str) -> Callable[[], object]:
        return lambda: "".join(fragments(base / name, "text", lambda turns: str(turns)))

    def in_bundle(name: str, kind: str) -> Reader:
        return Reader(file=bundle / name, kind=kind, read=lambda: open_bundle(bundle), prepare=lambda: _sign(bundle))

    return {
        "map.json": Reader(file=root / "map.json", kind="json", read=lambda: _planned(root)),
        "scoremap.safetensors": Reader(
            file=root / "scoremap.safetensors",
            kind="safetensors",
            read=lambda: _planned(root),
            prepare=lambda: _rehash_map(root),
        ),
        "store.json": Reader(file=root / "store.json", kind="json", read=lambda: _store(root)),
        "store.safetensors": Reader(file=root / "store.safetensors", kind="safetensors", read=lambda: _store(root)),
        "reference.safetensors": Reader(
            file=root / "reference.safetensors", kind="safetensors", read=lambda: _reference(root)
        ),
        "plan.json": Reader(file=bundle / "plan.json", kind="json", read=lambda: read_plan(bundle / "plan.json")),
        "signed plan.json": in_bundle("plan.json", "json"),
        "packager.json": Reader(file=bundle / "packager.json", kind="json", read=lambda: open_bundle(bundle)),
        "signed packager.json": in_bundle("packager.json", "json"),
        "SHA256SUMS": Reader(file=bundle / "SHA256SUMS", kind="bytes", read=lambda: open_bundle(bundle)),
        "signed genai_config.json": in_bundle("genai_config.json", "json"),
        "genai_config.json": Reader(file=bundle / "genai_config.json", kind="json", read=lambda: _settings(bundle)),
        "signed config.json": in_bundle("config.json", "json"),
        "signed tokenizer_config.json": in_bundle("tokenizer_config.json", "json"),
        "signed model_q4.onnx": in_bundle("onnx/model_q4.onnx", "bytes"),
        "signed profile.toml": in_bundle("profile.toml", "toml"),
        "report.json": Reader(file=bundle / "report.json", kind="json", read=lambda: earlier_rounds(bundle, "0" * 64)),
        "profile.toml": Reader(file=profile_file, kind="toml", read=lambda: load_profile(str(profile_file))),
        "size": Reader(file=base / "size", kind="bytes", read=lambda: _size(base / "size")),
        "safetensors": Reader(
            file=model / "model.safetensors",
            kind="safetensors",
            read=lambda: read_header(model / "model.safetensors"),
        ),
        "gguf": Reader(file=gguf, kind="bytes", read=lambda: read_gguf_header(gguf)),
        "config.json": Reader(file=model / "config.json", kind="json", read=lambda: read_config(model, "a model")),
        "generation_config.json": Reader(
            file=model / "generation_config.json", kind="json", read=lambda: generation_settings(model)
        ),
        **{
            name: Reader(file=base / name, kind="json" if name == "all.json" else "bytes", read=texts_of(name))
            for name in ("lines.jsonl", "all.json", "table.csv", "plain.txt")
        },
    }


def refused(reader: Reader, content: bytes) -> bool:
    """Whether the reader refuses `content` in place of its file. Other exceptions than the package's pass through."""
    own = [reader.file.parent / name for name in ("packager.json", "SHA256SUMS", "map.json")]
    own += [reader.file.parent.parent / name for name in ("packager.json", "SHA256SUMS")]
    before = {path: path.read_bytes() for path in {reader.file, *own} if path.is_file()}
    try:
        reader.file.write_bytes(content)
        reader.prepare()
        begun = time.process_time()
        try:
            reader.read()
        except PackagerError as error:
            # A terminal must be able to show it.
            said = str(error).encode()
            if len(said) > MOST_SAID:
                raise AssertionError(f"an error of {len(said)} bytes") from error
            return True
        finally:
            assert time.process_time() - begun < MOST_SECONDS
        return False
    finally:
        for path, kept in before.items():
            path.write_bytes(kept)
