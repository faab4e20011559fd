"""What a map is of: `map.json`, typed and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packager.errors import ArtifactError
from packager.io.files import inner_path, read_json, refuse_stray_links, require_distinct, sha256_file
from packager.io.outputs import Artefact
from packager.io.records import from_plain
from packager.memory.geometry import Geometry
from packager.scoremap.anchors import Anchor
from packager.scoremap.model import IDENTITY_FILE, MAP_FILE, SCHEMA, STORE_FILE

MAP = Artefact(noun="map", marker=IDENTITY_FILE, keys=("model", "files"), listed=lambda identity: identity["files"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """The source model: `sha256` over its weight files, `parameters` counted once where tied."""

    name: str
    source: str
    sha256: str
    architecture: str
    parameters: int
    float16_bytes: int
    max_context_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationIdentity:
    """The calibration text: what it was, a hash over its token ids, how many tokens were used."""

    text: str
    sha256: str
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One measurement: the class of option perturbed, its summed price, and what it cost, in nats per token."""

    kind: str
    predicted_nats: float
    measured_nats: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Mean loss of the source model on the held-out windows, in nats per token."""

    heldout_nats: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheScore:
    """What a key/value cache of 8-bit codes costs on the held-out windows, in nats per token; `refusal` says why this
    model cannot have one, empty where it can."""

    loss_nats: float
    refusal: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapIdentity:
    """`map.json`. `files` maps every other file of the map to its sha256. Maps of before there was a choice of caches
    have no `int8_cache`."""

    schema: int
    model: ModelIdentity
    geometry: Geometry
    calibration: CalibrationIdentity
    losses: Losses
    probes: tuple[Probe, ...]
    anchors: tuple[Anchor, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]
    int8_cache: CacheScore | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `map.json`."""
        return asdict(self)


def read_identity(folder: Path) -> MapIdentity:
    """`map.json` of a map, checked against the score map it names by hash."""
    path = folder / IDENTITY_FILE
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {data.get('schema')!r}, this version reads {SCHEMA}: score the model again"
        )
    identity = from_plain(MapIdentity, data, str(path))
    require_distinct(identity.files, str(path))
    found = sha256_file(folder / MAP_FILE)
    if identity.files.get(MAP_FILE) != found:
        raise ArtifactError(
            f"{folder / MAP_FILE} is not the file that {IDENTITY_FILE} names (sha256 {found[:12]}…): score the model "
            f"again"
        )
    return identity


def check_files(folder: Path, identity: MapIdentity) -> None:
    """Every file of the map but the store has the hash that `map.json` names; the store's tensors are checked as they
    are copied, for hashing all of it would cost more than building."""
    refuse_stray_links(folder, [*identity.files, IDENTITY_FILE])
    for name, expected in identity.files.items():
        path = inner_path(folder, name)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: the map is incomplete, score the model again")
        if name != STORE_FILE and sha256_file(path) != expected:
            raise ArtifactError(
                f"{path} is not the file that {IDENTITY_FILE} names: it was altered or damaged, score the model again"
            )


def require_model(folder: Path, identity: MapIdentity, name: str, sha256: str) -> None:
    """ArtifactError when the map in `folder` is not of the model `name` whose weights hash to `sha256`."""
    model = identity.model
    if model.sha256 != sha256:
        raise ArtifactError(
            f"{folder} is the map of another model: {model.name} (sha256 {model.sha256[:12]}…), not {name} "
            f"({sha256[:12]}…); "
            "name another map with --map, or remove this one"
        )
