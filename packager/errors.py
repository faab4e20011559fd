"""Every exception the package raises on purpose.

PackagerError                   anything a user can act on; the command line prints it as one line
├── UsageError                  a value on the command line cannot be understood (exit 2)
│   └── MissingExtraError       what was asked for needs an extra of the package that is not installed (exit 2)
├── ProfileError                a device profile is unknown, malformed or inconsistent
├── ArtifactError               a map, plan or bundle on disk is missing, damaged or of another version
├── ModelError                  a source model cannot be read (missing, pickled, truncated, not finite)
│   └── UnsupportedModelError   the architecture or a tensor has no place in the exported graph
├── CalibrationError            the calibration text is missing, empty or too short
├── OutputError                 an output cannot be written: the place is full, read-only, or taken by another process
├── InfeasibleBudgetError       nothing the map offers fits (exit 4)
├── ExportError                 the graph could not be written or does not match the map
└── RuntimeCheckError           the runtime refused to load or run what was built
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any


class PackagerError(Exception):
    """Base of the tree. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(PackagerError):
    """A command line value that cannot be understood."""

    exit_code = 2


class MissingExtraError(UsageError):
    """What was asked for needs an extra of the package that is not installed. `library` is what was not found,
    `command` what brings it.
    """

    def __init__(self, purpose: str, *, library: str, extra: str) -> None:
        self.library = library
        self.command = f'pip install "edge-packager[{extra}]"'
        # From PyPI torch comes with gigabytes of CUDA, which a machine without such a card has no use for.
        smaller = " (CPU only: pip install torch --index-url https://download.pytorch.org/whl/cpu first)"
        hint = smaller if library == "torch" else ""
        super().__init__(f"{purpose} needs {library}, which is not installed: {self.command}{hint}")


def require_extra(extra: str, libraries: Iterable[str], purpose: str) -> None:
    """MissingExtraError, with the command that brings it, where one of an extra's `libraries` is not installed. None of
    them is imported.

    `purpose` is the subject of the sentence: "measuring on another text".
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError(purpose, library=library, extra=extra)


class ProfileError(PackagerError):
    """A device profile is unknown, malformed or inconsistent."""


class ArtifactError(PackagerError):
    """A map, plan or bundle on disk is missing, damaged or of another schema version."""


class ModelError(PackagerError):
    """A source model cannot be read."""


class UnsupportedModelError(ModelError):
    """The architecture, or one tensor of it, has no place in the exported graph."""


class CalibrationError(PackagerError):
    """The calibration text is missing, empty or too short."""


class ExportError(PackagerError):
    """The graph could not be written or does not match the map."""


class RuntimeCheckError(PackagerError):
    """The runtime refused to load or run what was built."""


class OutputError(PackagerError):
    """An output cannot be written: its place is full, read-only, not permitted, or another process writes it."""


class InfeasibleBudgetError(PackagerError):
    """Even the smallest model the map offers needs more memory than the budget. `shortfall`: its terms, and what would
    fit."""

    exit_code = 4

    def __init__(
        self, message: str, *, budget_bytes: int, minimum_bytes: int, shortfall: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.shortfall = shortfall
