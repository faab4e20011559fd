"""Where long work reports how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """One phase after another, each of a known number of steps.

    Work runs in the caller's thread: what a method raises stops it, leaves nothing under a final name, and reaches the
    caller as it is.
    """

    def phase(self, name: str, total: int) -> None:
        """A new phase of `total` steps begins."""

    def advance(self, steps: int = 1) -> None:
        """`steps` more steps of the phase are done."""

    def warn(self, message: str) -> None:
        """Something the user should know; work goes on."""


class Silent:
    """Listens to nothing."""

    def phase(self, name: str, total: int) -> None:
        """Ignored."""

    def advance(self, steps: int = 1) -> None:
        """Ignored."""

    def warn(self, message: str) -> None:
        """Ignored."""
