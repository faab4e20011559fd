"""Opening a bundle: its manifest, after every file was found as it says. Nothing in a bundle is executed.

Every verb opens a bundle here, so what may be in one is checked here, before anything of it is loaded: the rules are
those of `runtime.device_check`, which a device runs as check.py, and what needs the package's own types besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.bundle.folder import MANIFEST_FILE, UNLISTED, BundleFolder
from packager.bundle.manifest import Manifest, parse_manifest
from packager.errors import ArtifactError, ProfileError
from packager.io.files import inner_path, read_json, refuse_stray_links, sha256_file
from packager.planning.plan import read_plan
from packager.profile import parse_profile
from packager.runtime.device_check import RefusedError, refuse_untrusted


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedBundle:
    """A bundle, and where it lies."""

    folder: BundleFolder
    manifest: Manifest


def open_bundle(root: Path) -> OpenedBundle:
    """The bundle in folder `root`.

    ArtifactError unless every file has the size and hash that its manifest says, the manifest those that SHA256SUMS
    and the plan say, no other file is there, and graph and settings ask for nothing but a model's work.
    """
    folder = BundleFolder(root=root)
    if not folder.exists():
        raise ArtifactError(
            f"{root} is not a bundle ({MANIFEST_FILE} is missing): make one with 'packager pack' or 'packager build'"
        )
    data = read_json(folder.manifest)
    manifest = parse_manifest(data, str(folder.manifest))
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
    try:
        refuse_untrusted(root, data)
    except RefusedError as error:
        raise ArtifactError(str(error)) from None
    _hold_against_plan(folder, manifest)
    return OpenedBundle(folder=folder, manifest=manifest)


def _hold_against_plan(folder: BundleFolder, manifest: Manifest) -> None:
    """ArtifactError unless the manifest promises what the plan and the profile in the bundle say."""
    plan, where = read_plan(folder.plan), str(folder.manifest)
    bounds, predicted = manifest.bounds, manifest.predicted
    agreements: dict[str, tuple[Any, Any]] = {
        "plan_sha256": (manifest.plan_sha256, sha256_file(folder.plan)),
        "map_sha256": (manifest.map_sha256, plan.map_sha256),
        "profile": (manifest.profile, plan.profile),
        "profile_sha256": (manifest.profile_sha256, plan.profile_sha256),
        "bounds.budget_bytes": (bounds.budget_bytes, plan.budget_bytes),
        "bounds.context_tokens": (bounds.context_tokens, plan.context_tokens),
        "bounds.prompt_tokens": (bounds.prompt_tokens, plan.prompt_tokens),
        "predicted.peak_bytes": (predicted.peak_bytes, plan.peak_bytes),
        "predicted.loss_nats": (predicted.loss_nats, plan.loss_nats),
        "predicted.file_bytes": (predicted.file_bytes, plan.file_bytes),
        "predicted.memory": (predicted.memory, plan.memory),
        "cache": (manifest.cache, plan.cache),
        "units": ({unit.name: unit.form for unit in manifest.units}, plan.choices),
    }
    for name, (said, planned) in agreements.items():
        if said != planned:
            raise ArtifactError(
                f"{where}: {name} is not what {folder.plan.name} says: one of them was altered, build the bundle again"
            )
    # Its text may be another than the profile that was planned with, which a program may have changed: it is read for
    # faults alone, and the profile's hash held against the plan's.
    try:
        text = folder.profile.read_text(encoding="utf-8")
        parse_profile(text, where=str(folder.profile), name=manifest.profile)
    except (OSError, ValueError, ProfileError) as error:
        raise ArtifactError(f"{folder.profile} cannot be read ({error}): build the bundle again") from None
