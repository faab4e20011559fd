"""Opening a bundle: its manifest, after every file was found as it says. Nothing in a bundle is executed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packager.bundle.folder import MANIFEST_FILE, UNLISTED, BundleFolder
from packager.bundle.manifest import Manifest, parse_manifest
from packager.errors import ArtifactError
from packager.io.files import inner_path, read_json, refuse_stray_links, sha256_file


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedBundle:
    """A bundle, and where it lies."""

    folder: BundleFolder
    manifest: Manifest


def open_bundle(root: Path) -> OpenedBundle:
    """The bundle in folder `root`. ArtifactError unless every file has the size and hash that its manifest says."""
    folder = BundleFolder(root=root)
    if not folder.exists():
        raise ArtifactError(
            f"{root} is not a bundle ({MANIFEST_FILE} is missing): make one with 'packager pack' or 'packager build'"
        )
    manifest = parse_manifest(read_json(folder.manifest), str(folder.manifest))
    refuse_stray_links(root, [*(entry.path for entry in manifest.files), *UNLISTED])
    for entry in manifest.files:
        file = inner_path(root, entry.path)
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: the bundle is incomplete, build it again")
        size = file.stat().st_size
        if size != entry.bytes or sha256_file(file) != entry.sha256:
            raise ArtifactError(
                f"{file} is not the file its manifest names (expected {entry.bytes} bytes, found {size}): the bundle "
                "was altered or damaged"
            )
    return OpenedBundle(folder=folder, manifest=manifest)
