"""The folder of a `.map`: every path in it and every key of its store, spelled here and nowhere else.

scoremap.safetensors      units, options, moves
store.safetensors         the packed bytes of every option, by `unit|form|tensor`
store.json                the digest of every tensor of the store
skeleton/PROVIDER/        the exporter's graph without its weights, and the runtime's configuration
model/                    what goes into a bundle as it is: config.json, the tokenizer's files, …
reference.safetensors     norms and biases, steps of an 8-bit cache, held-out text: see `reference`
map.json                  what it is of, and the hash of every other file
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import ArtifactError
from packager.forms.registry import Form
from packager.graph.names import GENAI_FILE, GRAPH_FILE
from packager.io.files import read_json
from packager.io.outputs import Artefact
from packager.io.safetensors_ranges import Region, StoredTensor, read_header, sha256_region
from packager.scoremap.reference import REFERENCE_FILE, ReferenceFile

IDENTITY_FILE = "map.json"
SCOREMAP_FILE = "scoremap.safetensors"
STORE_FILE = "store.safetensors"
DIGESTS_FILE = "store.json"
SKELETON_FOLDER = "skeleton"
SIDE_FOLDER = "model"
MAP = Artefact(noun="map", marker=IDENTITY_FILE, keys=("model", "files"), listed=lambda identity: identity["files"])
"""What tells a map from other folders."""


def option_key(form: str, tensor: str) -> str:
    """The key of one tensor of an option among those of its unit."""
    return f"{form}|{tensor}"


def store_key(unit: str, form: str, tensor: str) -> str:
    """The key of one tensor of an option in the store of a map."""
    return f"{unit}|{option_key(form, tensor)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skeleton:
    """The graph without its weights that was exported for one execution provider, and the runtime's configuration."""

    graph: Path
    genai_config: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class MapFolder:
    """The paths of a map in folder `root`, whole or being written. Nothing is read until a method is called."""

    root: Path

    @property
    def identity(self) -> Path:
        """What the map is of: see `identity.MapIdentity`."""
        return self.root / IDENTITY_FILE

    @property
    def scoremap(self) -> Path:
        """Units, options and moves: see `model.ScoreMap`."""
        return self.root / SCOREMAP_FILE

    @property
    def store(self) -> Path:
        """The packed bytes of every option, by `store_key`."""
        return self.root / STORE_FILE

    @property
    def digests(self) -> Path:
        """JSON of `store_key` → hex SHA-256 of the tensor's bytes."""
        return self.root / DIGESTS_FILE

    @property
    def reference(self) -> ReferenceFile:
        """What a reference in torch needs besides the matrices, and the held-out text."""
        return ReferenceFile(path=self.root / REFERENCE_FILE)

    @property
    def skeletons(self) -> Path:
        """The folder of all skeletons, one folder for each execution provider."""
        return self.root / SKELETON_FOLDER

    @property
    def side_folder(self) -> Path:
        """The folder of what goes into a bundle as it is."""
        return self.root / SIDE_FOLDER

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, among what goes into a bundle as it is."""
        return self.side_folder / "tokenizer.json"

    def exists(self) -> bool:
        """Whether a map lies here."""
        return self.identity.is_file()

    def side_files(self) -> list[Path]:
        """The files that go into a bundle as they are, in one order."""
        return sorted(self.side_folder.iterdir())

    def skeleton_folder(self, provider: str) -> Path:
        """Where the skeleton for an execution provider lies, if there is one."""
        return self.skeletons / provider

    def skeleton(self, provider: str) -> Skeleton:
        """The skeleton for an execution provider. ArtifactError where the map has none."""
        folder = self.skeleton_folder(provider)
        if not folder.is_dir():
            raise ArtifactError(
                f"{self.root} has no graph for {provider}: score the model again with --provider {provider}"
            )
        return Skeleton(graph=folder / GRAPH_FILE, genai_config=folder / GENAI_FILE)

    def open_store(self) -> Store:
        """The store's header and digests. ArtifactError where either is missing or damaged."""
        tensors, _ = read_header(self.store)
        return Store(path=self.store, tensors=tensors, digests=read_json(self.digests))


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """The packed bytes of every option of a map: where each tensor lies, and what it hashes to, by `store_key`."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    digests: Mapping[str, Any]

    def placement_regions(self, unit: str, form: Form, rows: int, cols: int) -> dict[str, Region]:
        """Where the tensors of a unit of shape (rows, cols) in a form lie, by their names in the form.

        ArtifactError where one is missing, or its bytes are not those that were scored: they are read to see.
        """
        regions = {}
        for name in form.tensors(rows, cols):
            key = store_key(unit, form.label, name)
            if key not in self.tensors:
                raise ArtifactError(
                    f"{self.path} has no {key!r}: store and map do not belong together, score the model again"
                )
            regions[name] = self.tensors[key].region
            if sha256_region(regions[name]) != self.digests.get(key):
                raise ArtifactError(
                    f"{self.path}: the bytes of {key!r} are not those that were scored: the store is damaged, score "
                    "the model again"
                )
        return regions
