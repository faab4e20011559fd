"""The work folder: what an unfinished score leaves beside its target, so that a killed run goes on where it was.

    key                        the digest of what the files depend on
    skeleton/PROVIDER/         the exported graph without weights
    curvature-N.safetensors    curvature of group N of units, until the group's options are finished
    start-UNIT.safetensors     what ACIP takes a unit apart into
    acip.safetensors           ACIP's training, as it goes
    unit-UNIT.safetensors      the finished options of a unit
    measured.json              finished probes and anchors, see `packager.scoring.ledger`

Each file appears whole or not at all. What lies there belongs to one key: another key starts anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from packager.forms.registry import parse_form
from packager.io.files import sha256_json, write_text
from packager.io.safetensors_ranges import StoredTensor, read_header
from packager.scoremap.folder import option_key
from packager.scoremap.model import Option, Unit, front
from packager.scoremap.settings import ScoreSettings
from packager.scoring.acip.training import Start
from packager.scoring.curvature.moments import Curvature
from packager.scoring.ledger import Ledger
from packager.scoring.scored import Scored


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkKey:
    """What finished work depends on: hashes of the `model`'s weights and of the `calibration` text, the settings, the
    map's schema, `versions` of the software, and the `forms` tried."""

    model: str
    calibration: str
    settings: ScoreSettings
    schema: int
    versions: dict[str, str]
    forms: tuple[str, ...]


class Workspace:
    """The work folder of one map: owns every path in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.training_state = folder / "acip.safetensors"
        self.ledger = Ledger(folder / "measured.json")

    @classmethod
    def open(cls, out: Path, key: WorkKey) -> Workspace:
        """That of the map `out`; emptied when what lies there is of another `key`."""
        folder = out.parent / f".{out.name}.work"
        digest, marker = sha256_json(asdict(key)), folder / "key"
        if folder.exists() and (not marker.is_file() or marker.read_text(encoding="utf-8") != digest):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(marker, digest)
        return cls(folder)

    def remove(self) -> None:
        """All of it: the map is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save_curvature(self, group: int, curvature: Mapping[str, Curvature]) -> None:
        """Keep the curvature of group number `group`, by unit, until `drop_curvature`."""
        tensors: dict[str, torch.Tensor] = {}
        for name, item in curvature.items():
            tensors[f"{name}|rounding"] = item.rounding.cpu()
            for block, variance in item.noise.items():
                tensors[f"{name}|noise|{block}"] = variance.cpu().clone()
            for index, (hessian, gradient) in enumerate(item.pairs):
                tensors[f"{name}|{index}|h"] = hessian.cpu().clone()
                tensors[f"{name}|{index}|g"] = gradient.cpu().clone()
        _write(self._curvature(group), lambda path: save_torch(tensors, path))

    def load_curvature(
        self, group: int, names: Iterable[str], blocks: Sequence[int], device: torch.device
    ) -> dict[str, Curvature] | None:
        """The curvature of the units `names` as it was kept, with the noise of `blocks`; None where none is."""
        if not self._curvature(group).is_file():
            return None
        stored = load_torch(self._curvature(group), device=str(device))
        return {
            name: Curvature(
                pairs=tuple(
                    (stored[f"{name}|{i}|h"], stored[f"{name}|{i}|g"]) for i in range(2) if f"{name}|{i}|h" in stored
                ),
                rounding=stored[f"{name}|rounding"],
                noise={block: stored[f"{name}|noise|{block}"] for block in blocks},
            )
            for name in names
        }

    def drop_curvature(self, group: int) -> None:
        """The options of the group are finished."""
        self._curvature(group).unlink(missing_ok=True)

    def has_start(self, unit: Unit) -> bool:
        """Whether ACIP's start of the unit lies here."""
        return self._start(unit).exists()

    def save_start(self, unit: Unit, start: Start) -> None:
        """Keep what ACIP takes the unit apart into."""
        tensors = {
            "left": start.left.cpu().contiguous(),
            "right": start.right.cpu().contiguous(),
            "costs": start.costs.cpu(),
        }
        _write(self._start(unit), lambda path: save_torch(tensors, path))

    def load_start(self, unit: Unit, device: torch.device) -> Start:
        """What `save_start` kept."""
        return Start(**load_torch(self._start(unit), device=str(device)))

    def has_options(self, unit: Unit) -> bool:
        """Whether the unit's options are finished."""
        return self._options(unit).exists()

    def save_options(self, unit: Unit, made: Iterable[Scored]) -> None:
        """The options of one unit into one file: those that no other beats in both bytes and price."""
        scored = {item.option.form.label: item for item in made}
        chain = front([item.option for item in scored.values()])
        tensors = {
            option_key(option.form.label, name): tensor
            for option in chain
            for name, tensor in scored[option.form.label].tensors.items()
        }
        described = json.dumps([[option.form.label, option.bytes, option.loss_nats] for option in chain])
        _write(self._options(unit), lambda path: save_file(tensors, path, metadata={"options": described}))

    def load_options(self, unit: Unit) -> list[Option]:
        """A unit's finished options, without their tensors."""
        _, metadata = read_header(self._options(unit))
        return [
            Option(form=parse_form(label), bytes=size, loss_nats=loss)
            for label, size, loss in json.loads(metadata["options"])
        ]

    def load_weights(self, unit: Unit, option: Option) -> torch.Tensor:
        """The weights (rows, cols) that a finished option of a unit stands for."""
        with safe_open(self._options(unit), framework="numpy") as file:
            tensors = {
                name: file.get_tensor(option_key(option.form.label, name))
                for name in option.form.tensors(unit.rows, unit.cols)
            }
        return torch.from_numpy(option.form.dequantize(tensors, unit.rows, unit.cols))

    def stored_tensors(self, unit: Unit, chain: Iterable[Option]) -> dict[tuple[str, str], StoredTensor]:
        """Where the tensors of some of a unit's finished options lie, by the form's label and the tensor's name."""
        tensors, _ = read_header(self._options(unit))
        forms = [option.form for option in chain]
        keys = [(form.label, name) for form in forms for name in form.tensors(unit.rows, unit.cols)]
        return {key: tensors[option_key(*key)] for key in keys}

    def _curvature(self, group: int) -> Path:
        return self.folder / f"curvature-{group}.safetensors"

    def _start(self, unit: Unit) -> Path:
        return self.folder / f"start-{unit.name}.safetensors"

    def _options(self, unit: Unit) -> Path:
        return self.folder / f"unit-{unit.name}.safetensors"


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside `path`, and give it that name once it is whole."""
    temporary = path.with_suffix(".writing")
    write(temporary)
    temporary.rename(path)
