"""What to say of a map, bundle or plan that is not there: the names beside it that were probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from packager.errors import ArtifactError

_MOST_NAMES = 1000
"""More than this of a folder is not looked at."""


def is_map(path: Path) -> bool:
    """Whether a score map seems to lie at `path`."""
    from packager.scoremap.folder import MapFolder

    return MapFolder(root=path).scoremap.is_file()


def is_bundle(path: Path) -> bool:
    """Whether a bundle seems to lie at `path`."""
    from packager.bundle.folder import BundleFolder

    return BundleFolder(root=path).exists()


def is_artefact(path: Path) -> bool:
    """Whether a map, a bundle or a plan seems to lie at `path`."""
    return is_map(path) or is_bundle(path) or (path.suffix == ".json" and path.is_file())


def require_there(path: Path, what: str, alike: Callable[[Path], bool]) -> None:
    """ArtifactError where nothing lies at `path`, with the names nearest to it in its folder that are `alike`."""
    try:
        if path.exists():
            return
        beside = sorted(path.parent.iterdir())[:_MOST_NAMES]
    except (OSError, ValueError) as error:
        # A name that is too long or holds a zero byte, or a folder that is not there or may not be read.
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"{what} {str(path)!r} cannot be found: {path.parent}: {reason}") from None
    near = difflib.get_close_matches(path.name, [item.name for item in beside], n=10, cutoff=0.7)
    found = [str(path.parent / name) for name in near if alike(path.parent / name)][:2]
    hint = f": did you mean {' or '.join(found)}?" if found else ""
    raise ArtifactError(f"there is no {what} {str(path)!r}{hint}")
