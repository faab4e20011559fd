"""What the model itself says of the prices: factors from probes, and the curve through the map's anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from packager.errors import CalibrationError
from packager.io.files import sha256_json
from packager.planning.solver import choice_at, total_loss
from packager.scoremap.anchors import Anchor, monotone
from packager.scoremap.identity import Probe
from packager.scoremap.model import Option, ScoreMap, make_map
from packager.scoring.bench import Bench, first_half
from packager.scoring.probes import Observer, anchor_prefixes, corrected, multipliers, perturbed, probe_sets
from packager.source.unit_weights import Source

QUICK_ANCHOR_NATS = (0.01, 0.05, 0.2, 0.8)
ANCHOR_NATS = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6)
_NOISY_NATS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The map with its prices corrected, the loss (n, length - 1) of each held-out token but the first, the probes of
    each class, and anchors along the map."""

    scoremap: ScoreMap
    token_nats: torch.Tensor
    probes: tuple[Probe, ...]
    anchors: tuple[Anchor, ...]

    @property
    def heldout_nats(self) -> float:
        """Mean loss of the source model in nats per token."""
        return float(self.token_nats.double().mean())


@torch.no_grad()
def correct_and_anchor(bench: Bench, bands: int) -> Measured:
    """Probe the prices of the finished options, in `bands` of the depth, and anchor the map that they make.

    Raises CalibrationError when the model's own loss there is not finite.
    """
    units = [source.unit for source in bench.sources]
    options = [bench.work.load_options(unit) for unit in units]
    levels = QUICK_ANCHOR_NATS if bench.settings.quick else ANCHOR_NATS
    sets = probe_sets(units, options, bands)
    bench.progress.phase("probing what perturbations cost", len(sets) + len(levels) + 2)
    whole, glance = _Trial(bench, bench.heldout), _Trial(bench, first_half(bench.heldout))
    if not bool(torch.isfinite(whole.observer.token_nats).all()):
        raise CalibrationError(
            "the model's loss on the held-out text is not finite: the model overflows or the checkpoint is damaged"
        )
    bench.progress.advance()
    probes = tuple(_probe(glance, kind, chosen) for kind, chosen in sets.items())
    scoremap = make_map(units, corrected(units, options, multipliers(probes), bands))
    anchors = [_anchor(whole, scoremap, prefix) for prefix in anchor_prefixes(scoremap, levels)]
    bench.stopwatch.lap("probes")
    return Measured(scoremap=scoremap, token_nats=whole.observer.token_nats, probes=probes, anchors=monotone(anchors))


class _Trial:
    """The model on some held-out windows, to be measured with some units in other forms."""

    def __init__(self, bench: Bench, windows: torch.Tensor) -> None:
        self.bench, self.observer = bench, Observer(bench.model, windows)
        self._windows = len(windows)

    def measure(self, chosen: Mapping[str, Option]) -> tuple[float, float]:
        """Divergence and rise with the chosen options (by unit name), from the ledger where they were measured
        before."""
        forms = {name: option.form.label for name, option in chosen.items()}
        key = sha256_json({"windows": self._windows, "forms": forms})
        return self.bench.work.ledger.recall(key, lambda: self._perturbed(chosen))

    def _perturbed(self, chosen: Mapping[str, Option]) -> tuple[float, float]:
        rounds_inputs = self.bench.settings.kernels.rounds_inputs
        with perturbed(self.bench.model, self.bench.sources, chosen, self._load, rounds_inputs=rounds_inputs):
            return self.observer.measure()

    def _load(self, source: Source, option: Option) -> torch.Tensor:
        return self.bench.work.load_weights(source.unit, option)


def _probe(trial: _Trial, kind: str, chosen: Mapping[str, Option]) -> Probe:
    divergence, _ = trial.measure(chosen)
    trial.bench.progress.advance()
    predicted = sum(option.loss_nats for option in chosen.values())
    return Probe(kind=kind, predicted_nats=predicted, measured_nats=divergence)


def _anchor(trial: _Trial, scoremap: ScoreMap, prefix: int) -> Anchor:
    choice = choice_at(scoremap, prefix)
    divergence, rise = trial.measure(_chosen(scoremap, choice))
    trial.bench.progress.advance()
    # Small rises drown in the noise of the text; there the divergence, which has none, stands for them.
    measured = rise if rise > _NOISY_NATS else divergence
    return Anchor(priced_nats=total_loss(scoremap, choice), measured_nats=measured)


def _chosen(scoremap: ScoreMap, choice: Sequence[int]) -> dict[str, Option]:
    return {
        unit.name: chain[index] for unit, chain, index in zip(scoremap.units, scoremap.options, choice, strict=True)
    }
