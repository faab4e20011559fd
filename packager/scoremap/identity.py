"""What a map is of: `map.json`, typed and checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packager.errors import ArtifactError, UsageError
from packager.io.files import read_json, require_distinct, sha256_file
from packager.io.records import Count, Dimension, Positive, from_plain, shown
from packager.memory.geometry import Geometry
from packager.scoremap.anchors import Anchor
from packager.scoremap.folder import IDENTITY_FILE, SCOREMAP_FILE, MapFolder
from packager.scoremap.model import SCHEMA
from packager.scoremap.settings import ScoreSettings, without_retired


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """The source model: `sha256` over its weight files, `parameters` counted once where tied."""

    name: str
    source: str
    sha256: str
    architecture: str
    parameters: Positive
    float16_bytes: Positive
    max_context_tokens: Dimension


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationIdentity:
    """The calibration text: what it was, a hash over its token ids, how many tokens were used."""

    text: str
    sha256: str
    tokens: Count


_OF_HYBRIDS = ("cacheless_layers", "hybrid_bytes")


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
    settings: ScoreSettings
    versions: dict[str, str]
    files: dict[str, str]
    int8_cache: CacheScore | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `map.json`; what only hybrid models have is left out of the others'."""
        plain = asdict(self)
        plain["geometry"] = {
            name: value for name, value in plain["geometry"].items() if value or name not in _OF_HYBRIDS
        }
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str) -> MapIdentity:
        """The identity in `data`, read from `where`; unknown and missing keys and values out of range are errors."""
        if isinstance(settings := data.get("settings"), dict):
            data = data | {"settings": without_retired(settings)}
        try:
            return from_plain(cls, data, where)
        except UsageError as error:
            raise ArtifactError(f"{where}: settings: {error}: the file is damaged, or of another version") from None


def read_identity(root: Path) -> MapIdentity:
    """`map.json` of the map in folder `root`, checked against the score map it names by hash."""
    folder = MapFolder(root=root)
    path = folder.identity
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {shown(data.get('schema'))}, this version reads {SCHEMA}: score the model again"
        )
    identity = MapIdentity.from_dict(data, str(path))
    require_distinct(identity.files, str(path))
    found = sha256_file(folder.scoremap)
    if identity.files.get(SCOREMAP_FILE) != found:
        raise ArtifactError(
            f"{folder.scoremap} is not the file that {IDENTITY_FILE} names (sha256 {found[:12]}…): score the model "
            "again"
        )
    return identity


def require_model(folder: Path, identity: MapIdentity, name: str, sha256: str) -> None:
    """ArtifactError when the map in `folder` is not of the model `name` whose weights hash to `sha256`."""
    model = identity.model
    if model.sha256 != sha256:
        raise ArtifactError(
            f"{folder} is the map of another model: {model.name} (sha256 {model.sha256[:12]}…), not {name} "
            f"({sha256[:12]}…); "
            "name another map with --map, or remove this one"
        )
