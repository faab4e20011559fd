"""Opening a `.map`: the score map and what it is of, checked; its store and skeletons are read when they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from packager.errors import ArtifactError
from packager.io.files import inner_path, refuse_stray_links, sha256_file
from packager.memory.geometry import Geometry
from packager.profile import FLOAT, INT8
from packager.runtime.device_check import (
    GENAI_RULES,
    GRAPH,
    RefusedError,
    read_object,
    refuse_fetching,
    refuse_graph,
    refuse_unlisted,
)
from packager.scoremap.anchors import Anchor, monotone
from packager.scoremap.folder import IDENTITY_FILE, STORE_FILE, MapFolder, Skeleton
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
        """ArtifactError unless every file of the map but the store has the hash that `map.json` names, no other would
        go into a bundle, and its graphs ask for no more than a bundle's may.

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
        for path in self.folder.side_files():
            if path.relative_to(self.folder.root).as_posix() not in self.identity.files:
                raise ArtifactError(f"{path} is not a file that {IDENTITY_FILE} names: take it away")
        try:
            refuse_fetching(self.folder.side_folder)
            for folder in sorted(self.folder.skeletons.iterdir()):
                _refuse_hostile(self.folder.skeleton(folder.name))
        except RefusedError as error:
            raise ArtifactError(str(error)) from None


def _refuse_hostile(skeleton: Skeleton) -> None:
    """RefusedError for a graph or a runtime's configuration that no bundle may have: one is made of them."""
    refuse_graph(skeleton.graph)
    config = read_object(skeleton.genai_config)
    if isinstance(model := config.get("model"), dict) and isinstance(decoder := model.get("decoder"), dict):
        decoder["filename"] = GRAPH  # a bundle's own stands in place of the exporter's
    refuse_unlisted(config, GENAI_RULES, str(skeleton.genai_config))


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
