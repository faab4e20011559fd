"""The curvature method: every form of a unit made and priced under its own curvature, whatever the others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packager.errors import CalibrationError
from packager.forms.registry import Form
from packager.scoremap.model import Unit
from packager.scoremap.settings import ScoreSettings
from packager.scoring.bench import Bench
from packager.scoring.curvature.moments import Curvature, collect
from packager.scoring.curvature.options import forms_for, score_unit
from packager.scoring.method import MakeOptions
from packager.source.unit_weights import Source

_BANDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvatureMethod:
    """A `ScoringMethod`."""

    settings: ScoreSettings

    @property
    def bands(self) -> int:
        """A third of the depth each; one for all where there is no time for more probes."""
        return 1 if self.settings.quick else _BANDS

    def forms(self, unit: Unit) -> Sequence[Form]:
        """Floats, blocks of codes, and two factors."""
        return forms_for(unit, quick=self.settings.quick, kernels=self.settings.kernels)

    def check(self, units: Sequence[Unit]) -> None:
        """Nothing is refused."""

    def prepare(self, bench: Bench) -> MakeOptions:
        """Nothing: units are scored one by one."""
        quick, kernels = self.settings.quick, self.settings.kernels
        return lambda unit, weights, curvature: score_unit(unit, weights, curvature, quick=quick, kernels=kernels)


def group_curvature(bench: Bench, number: int, group: Sequence[Source]) -> dict[str, Curvature]:
    """Curvature of the units of group `number`, by name: as it lies among unfinished work, or measured now.

    Raises CalibrationError where it is not finite.
    """
    names = [source.unit.name for source in group]
    kept = bench.work.load_curvature(number, names, bench.blocks, bench.device)
    if kept is not None:
        return kept
    curvature = _measure(bench, group)
    for name, item in curvature.items():
        if not all(bool(torch.isfinite(matrix).all()) for pair in item.pairs for matrix in pair):
            raise CalibrationError(
                f"{name}: its activations on the calibration text are not finite: the model overflows in float32 or "
                "the checkpoint is damaged"
            )
    bench.work.save_curvature(number, curvature)
    return curvature


def _measure(bench: Bench, group: Sequence[Source]) -> dict[str, Curvature]:
    bench.progress.phase(f"measuring curvature on {bench.text.description}", len(bench.text.windows))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        bench.progress.advance(count - done)
        done = count

    return collect(bench.model, group, bench.text.windows, blocks=bench.blocks, batch=1, progress=advance)
