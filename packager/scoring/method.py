"""What a way of scoring has to offer; each lives in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from packager.forms.kinds import KINDS, Kind
from packager.forms.registry import Form
from packager.scoremap.model import Unit
from packager.scoremap.settings import Kernels
from packager.scoring.bench import Bench
from packager.scoring.curvature.moments import Curvature
from packager.scoring.scored import Scored

MakeOptions = Callable[[Unit, Tensor, Curvature], Iterator[Scored]]
"""Every option of a unit with weights (rows, cols), under its curvature."""


class ScoringMethod(Protocol):
    """Curvature or ACIP: what is tried for a unit, and what makes it and gives it its price."""

    @property
    def bands(self) -> int:
        """In how many parts of the depth probes correct the prices apart from each other."""

    def forms(self, unit: Unit) -> Sequence[Form]:
        """The forms that a unit is tried in."""

    def check(self, units: Sequence[Unit]) -> None:
        """UsageError where the settings ask for what these units cannot give; nothing has been computed yet."""

    def prepare(self, bench: Bench) -> MakeOptions:
        """Compute what is of all units together; what makes the options of each then. Resumed from the work folder."""


def large_unit(kind: Kind) -> Unit:
    """A unit for which no form is too long: what is tried for it is all that is ever tried."""
    return Unit(name=kind, kind=kind, rows=1 << 12, cols=1 << 12, matrix=kind)


def labels_tried(method: ScoringMethod) -> tuple[str, ...]:
    """Every kind of unit with the labels of the forms it is tried in."""
    return tuple(f"{kind} {form.label}" for kind in KINDS for form in method.forms(large_unit(kind)))


def rounded_blocks(method: ScoringMethod, units: Iterable[Unit], kernels: Kernels) -> tuple[int, ...]:
    """Elements of an input that kernels of the forms tried for `units` round together, each size once, rising."""
    if not kernels.rounds_inputs:
        return ()
    blocks = {form.activation_block for unit in units for form in method.forms(unit)}
    return tuple(sorted(block for block in blocks if block is not None))
