"""The work folder: what an unfinished score leaves beside its target, so that a killed run goes on where it was.

Curvature by group of units, options by unit; each file appears whole or not at all. What lies there belongs to one key:
whatever the files depend on. Another key starts anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from packager.forms.packing import dequantize
from packager.forms.registry import parse_form
from packager.io.files import dump_json, sha256_json, write_text
from packager.io.safetensors_ranges import StoredTensor, join, read_header, sha256_region
from packager.scoremap.model import DIGESTS_FILE, STORE_FILE, Option, ScoreMap, Unit, front
from packager.scoring.curvature.moments import Curvature
from packager.scoring.curvature.options import Scored

LEDGER_FILE = "measured.json"


def open_work(out: Path, key: Mapping[str, Any]) -> Path:
    """The folder for the unfinished work of the map `out`; emptied when what lies there is of another `key`."""
    work = out.parent / f".{out.name}.work"
    digest, marker = sha256_json(key), work / "key"
    if work.exists() and (not marker.is_file() or marker.read_text(encoding="utf-8") != digest):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_text(marker, digest)
    return work


def curvature_path(work: Path, group: int) -> Path:
    """Where the curvature of group number `group` lies until the group's options are finished."""
    return work / f"curvature-{group}.safetensors"


def save_curvature(path: Path, curvature: Mapping[str, Curvature]) -> None:
    """Write the curvature of a group, by unit."""
    tensors = {}
    for name, item in curvature.items():
        tensors[f"{name}|rounding"], tensors[f"{name}|noise"] = item.rounding.cpu(), item.noise.cpu()
        for index, (hessian, gradient) in enumerate(item.pairs):
            tensors[f"{name}|{index}|h"], tensors[f"{name}|{index}|g"] = hessian.cpu().clone(), gradient.cpu().clone()
    temporary = path.with_suffix(".writing")
    save_torch(tensors, temporary)
    temporary.rename(path)


def load_curvature(path: Path, names: Iterable[str], device: torch.device) -> dict[str, Curvature]:
    """The curvature of the units `names`, as `save_curvature` wrote it."""
    stored = load_torch(path, device=str(device))
    return {
        name: Curvature(
            pairs=tuple(
                (stored[f"{name}|{i}|h"], stored[f"{name}|{i}|g"]) for i in range(2) if f"{name}|{i}|h" in stored
            ),
            rounding=stored[f"{name}|rounding"],
            noise=stored[f"{name}|noise"],
        )
        for name in names
    }


def options_path(work: Path, unit: Unit) -> Path:
    """Where a unit's finished options lie."""
    return work / f"unit-{unit.name}.safetensors"


def save_options(work: Path, unit: Unit, made: Iterable[Scored]) -> None:
    """The options of one unit into one file: those that no other beats in both bytes and price."""
    scored = {item.option.form.label: item for item in made}
    chain = front([item.option for item in scored.values()])
    tensors = {
        f"{option.form.label}|{name}": tensor
        for option in chain
        for name, tensor in scored[option.form.label].tensors.items()
    }
    described = json.dumps([[option.form.label, option.bytes, option.loss_nats] for option in chain])
    path = options_path(work, unit)
    temporary = path.with_suffix(".writing")
    save_file(tensors, temporary, metadata={"options": described})
    temporary.rename(path)


def load_options(work: Path, unit: Unit) -> list[Option]:
    """A unit's finished options, without their tensors."""
    _, metadata = read_header(options_path(work, unit))
    return [
        Option(form=parse_form(label), bytes=size, loss_nats=loss)
        for label, size, loss in json.loads(metadata["options"])
    ]


def load_weights(work: Path, unit: Unit, option: Option) -> torch.Tensor:
    """The weights (rows, cols) that a finished option of a unit stands for."""
    with safe_open(options_path(work, unit), framework="numpy") as file:
        tensors = {
            name: file.get_tensor(f"{option.form.label}|{name}") for name in option.form.tensors(unit.rows, unit.cols)
        }
    return torch.from_numpy(dequantize(option.form, tensors, unit.rows, unit.cols))


def write_store(work: Path, scoremap: ScoreMap, out: Path) -> None:
    """Join what the map needs of the units' files into the one store of the map in folder `out`, with a digest of every
    tensor."""
    entries: list[tuple[str, StoredTensor]] = []
    for unit, chain in zip(scoremap.units, scoremap.options, strict=True):
        tensors, _ = read_header(options_path(work, unit))
        for option in chain:
            for name in option.form.tensors(unit.rows, unit.cols):
                key = f"{option.form.label}|{name}"
                entries.append((f"{unit.name}|{key}", tensors[key]))
    join(entries, out / STORE_FILE)
    write_text(out / DIGESTS_FILE, dump_json({key: sha256_region(tensor.region) for key, tensor in entries}))
