"""Opening a `.map`: the score map and what it is of, checked; its store and skeletons are read when they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from packager.errors import ArtifactError
from packager.io.files import inner_path, refuse_stray_links, sha256_file
from packager.memory.geometry import Geometry
from packager.profile import FLOAT, INT8
from packager.scoremap.anchors import Anchor, monotone
from packager.scoremap.folder import IDENTITY_FILE, STORE_FILE, MapFolder
from packager.scoremap.identity import MapIdentity, read_identity
from packager.scoremap.model import ScoreMap, read_map


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedMap:
    """A score map with its identity, and where it lies; `cache` is the kind of key/value cache that is planned with."""

    folder: MapFolder
    scoremap: ScoreMap
    identity: MapIdentity
    geometry: Geometry
    anchors: tuple[Anchor, ...]
    cache: str = FLOAT

    @property
    def cache_nats(self) -> float:
        """What the cache adds to the loss."""
        score = self.identity.int8_cache
        return score.loss_nats if self.cache == INT8 and score is not None else 0.0

    def with_cache(self, cache: str) -> OpenedMap:
        """The same map with a cache of that kind."""
        return replace(
            self, cache=cache, geometry=replace(self.geometry, cache_element_bytes=1 if cache == INT8 else 0)
        )

    @property
    def sha256(self) -> str:
        """Hash of `map.json`, which names every other file of the map by hash."""
        return sha256_file(self.folder.identity)

    def check_files(self) -> None:
        """ArtifactError unless every file of the map but the store has the hash that `map.json` names.

        The store's tensors are checked as they are copied, for hashing all of it would cost more than building.
        """
        refuse_stray_links(self.folder.root, [*self.identity.files, IDENTITY_FILE])
        for name, expected in self.identity.files.items():
            path = inner_path(self.folder.root, name)
            if not path.is_file():
                raise ArtifactError(f"{path} is missing: the map is incomplete, score the model again")
            if name != STORE_FILE and sha256_file(path) != expected:
                raise ArtifactError(
                    f"{path} is not the file that {IDENTITY_FILE} names: it was altered or damaged, score the model "
                    "again"
                )


def open_map(root: Path) -> OpenedMap:
    """Open a `.map` folder for planning: the score map and `map.json`, checked; the store is not touched."""
    folder = MapFolder(root=root)
    scoremap = read_map(root)
    identity = read_identity(root)
    return OpenedMap(
        folder=folder,
        scoremap=scoremap,
        identity=identity,
        geometry=identity.geometry,
        anchors=monotone(identity.anchors),
    )
