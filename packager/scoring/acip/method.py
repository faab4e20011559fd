"""The published method for linear units: one order of all their directions, learned in training over all of them.

Vocabularies have no directions to rank and are scored by curvature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from packager.forms.registry import Form
from packager.scoremap.model import Unit
from packager.scoremap.settings import AcipSettings, ScoreSettings
from packager.scoring.acip.options import Ranking, forms_ranked, rank_units, ranked_options, start_of
from packager.scoring.acip.training import check_reachable, train
from packager.scoring.bench import Bench
from packager.scoring.curvature.method import group_curvature
from packager.scoring.curvature.moments import Curvature, groups
from packager.scoring.curvature.options import forms_for, score_unit
from packager.scoring.method import MakeOptions
from packager.scoring.scored import Scored
from packager.source.unit_weights import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class AcipMethod:
    """A `ScoringMethod`; `acip` are the settings' own for it."""

    settings: ScoreSettings
    acip: AcipSettings

    @property
    def bands(self) -> int:
        """One factor for the whole depth: several would change the order that was learned."""
        return 1

    def forms(self, unit: Unit) -> Sequence[Form]:
        """For a linear unit those that its ranking is cut into, else those of the curvature method."""
        quick, kernels = self.settings.quick, self.settings.kernels
        if unit.kind == "linear":
            return forms_ranked(unit, self.acip.adapter_rank, quick=quick, kernels=kernels)
        return forms_for(unit, quick=quick, kernels=kernels)

    def check(self, units: Sequence[Unit]) -> None:
        """UsageError where the adapters alone keep more than the stop ratio."""
        check_reachable([(unit.rows, unit.cols) for unit in units if unit.kind == "linear"], self.acip)

    def prepare(self, bench: Bench) -> MakeOptions:
        """Rank the directions of every linear unit, unless the options of all are finished."""
        linear = [source for source in bench.sources if source.unit.kind == "linear"]
        rankings: dict[str, Ranking] = {}
        if not all(bench.work.has_options(source.unit) for source in linear):
            self._take_apart(bench)
            rankings = self._rank(bench, linear)
        bench.stopwatch.lap("acip")
        return lambda unit, weights, curvature: self._options(bench, rankings, unit, weights, curvature)

    def _take_apart(self, bench: Bench) -> None:
        """The start of every linear unit. Curvature comes first: it gives the directions that are trained."""
        for number, group in enumerate(groups(bench.sources)):
            missing = [
                source for source in group if source.unit.kind == "linear" and not bench.work.has_start(source.unit)
            ]
            if missing:
                curvature = group_curvature(bench, number, group)
                bench.progress.phase("taking layers apart", len(missing))
                for source in missing:
                    start = start_of(source.weight(bench.model), curvature[source.unit.name], self.acip.basis)
                    bench.work.save_start(source.unit, start)
                    bench.progress.advance()

    def _rank(self, bench: Bench, linear: Sequence[Source]) -> dict[str, Ranking]:
        """Train gates and adapters from the starts and rank every unit's directions; resumed from the work folder."""
        starts = {source.unit.name: bench.work.load_start(source.unit, bench.device) for source in linear}
        outcome = train(
            bench.model,
            linear,
            starts,
            bench.text.windows,
            self.acip,
            seed=self.settings.seed,
            adapt_whole=not self.settings.float_only,
            state=bench.work.training_state,
            progress=bench.progress,
        )
        costs = {name: start.costs.double().cpu().numpy() for name, start in starts.items()}
        return rank_units(outcome, costs, self.acip)

    def _options(
        self, bench: Bench, rankings: Mapping[str, Ranking], unit: Unit, weights: Tensor, curvature: Curvature
    ) -> Iterator[Scored]:
        quick, kernels = self.settings.quick, self.settings.kernels
        if unit.kind != "linear":
            return score_unit(unit, weights, curvature, quick=quick, kernels=kernels)
        start = bench.work.load_start(unit, weights.device)
        return ranked_options(unit, weights, curvature, start, rankings[unit.name], quick=quick, kernels=kernels)
