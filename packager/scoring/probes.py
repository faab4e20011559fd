"""What a perturbation really costs: the model is run with some units in compressed form.

The prices of `rounding.price` are a second-order surrogate. Two corrections are measured on held-out windows:

- a multiplier for each class of option (what bits, which third of the depth, or the vocabulary), from the divergence
  of small perturbations of that class alone: it corrects the order of the moves;
- a curve from summed prices to the measured rise of the loss, from a few prefixes of the finished map: below four
  bits units interact, and the sum of their prices falls short.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from packager.forms.floats import FloatForm
from packager.scoremap.identity import Probe
from packager.scoremap.model import Option, ScoreMap, Unit
from packager.scoring.losses import token_losses
from packager.scoring.rounding import activation_error
from packager.source.unit_weights import Source

_PROBE_NATS = 0.08
_LOGIT_LIMIT = 48 << 20
_LEAST, _MOST = 0.25, 6.0

Load = Callable[[Source, Option], Tensor]
"""The (rows, cols) float32 weights that an option of a source's unit stands for."""


class Observer:
    """The model's own predictions on held-out windows (n, length), against which perturbed ones are held."""

    def __init__(self, model: torch.nn.Module, windows: Tensor) -> None:
        self._model = model
        self._windows = windows.to(next(model.parameters()).device)
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        length = windows.shape[1]
        stride = max(2, math.ceil(windows.numel() * vocabulary / _LOGIT_LIMIT))
        self._positions = torch.arange(stride - 1, length - 1, stride, device=self._windows.device)
        self._log_chances, self.token_nats = self._run(model)

    @torch.no_grad()
    def _run(self, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """Log chances at the observed positions, and the loss of every token (n, length - 1)."""
        chances, losses = [], []
        for window in self._windows:
            logits, nats = token_losses(model, window)
            losses.append(nats)
            chances.append(torch.log_softmax(logits[self._positions], dim=-1))
        return torch.stack(chances), torch.stack(losses)

    def measure(self, model: torch.nn.Module | None = None) -> tuple[float, float]:
        """(divergence KL(original ‖ now), rise of the loss), both in nats per token, of another model or of the same
        one as it is now."""
        now, loss = self._run(self._model if model is None else model)
        divergence = (
            torch.nn.functional.kl_div(now, self._log_chances, reduction="none", log_target=True)
            .sum(-1)
            .double()
            .mean()
        )
        return float(divergence), float((loss - self.token_nats).double().mean())


@contextlib.contextmanager
def perturbed(
    model: torch.nn.Module,
    sources: Sequence[Source],
    chosen: Mapping[str, Option],
    load: Load,
    *,
    rounds_inputs: bool = True,
) -> Iterator[None]:
    """The model with the chosen options (by unit name) in the place of its weights, which come back at the end.

    With `rounds_inputs` the inputs of what is in codes are rounded to 8 bits too, as the kernels for CPUs round them.
    """
    saved = []
    blocks: dict[torch.nn.Module, int] = {}
    handles = []
    try:
        for source in sources:
            option = chosen.get(source.unit.name)
            if option is None or isinstance(option.form, FloatForm):
                continue
            weight = source.weight(model)
            saved.append((weight, weight.clone()))
            weight.copy_(load(source, option).to(weight.device))
            block = option.form.activation_block
            if rounds_inputs and block is not None and source.unit.kind != "embedding":
                linear = source.unit.kind == "linear"
                head = model.get_output_embeddings()  # type: ignore[operator]
                module = model.get_submodule(source.module) if linear else head
                # Parts of one matrix read the same inputs, each in its own blocks; here the shortest stand for all.
                blocks[module] = min(block, blocks.get(module, block))
        handles = [module.register_forward_pre_hook(rounding_hook(block)) for module, block in blocks.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, original in saved:
            weight.copy_(original)


def rounding_hook(block: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A forward pre-hook that rounds a module's inputs to 8 bits; gradients pass as if it did not."""

    def hook(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = arguments[0].flatten(0, -2).float()
        return (
            (rows + activation_error(rows.detach(), block)).to(arguments[0].dtype).view_as(arguments[0]),
            *arguments[1:],
        )

    return hook


def kind_of(unit: Unit, option: Option, position: float, bands: int) -> str:
    """The class whose multiplier an option takes; `position` is the unit's relative depth, 0 to 1, in one of
    `bands`."""
    kind = option.form.price_class
    if isinstance(option.form, FloatForm):
        return kind
    return (
        f"{kind}, vocabulary"
        if unit.kind != "linear"
        else f"{kind}, depth {min(int(position * bands), bands - 1) + 1} of {bands}"
    )


def probe_sets(units: Sequence[Unit], options: Sequence[Sequence[Option]], bands: int) -> dict[str, dict[str, Option]]:
    """For each class, a few units spread over its band and their options, priced together at about 0.08 nats.

    Of a unit's options in a class the middle one of those that cost at most a third of that: a probe of one unit would
    say more of the unit than of the class. Units without any stand aside, unless all are.
    """
    candidates: dict[str, list[tuple[str, Option]]] = {}
    costly: dict[str, list[tuple[str, Option]]] = {}
    for index, (unit, chain) in enumerate(zip(units, options, strict=True)):
        by_kind: dict[str, list[Option]] = {}
        for option in chain:
            by_kind.setdefault(kind_of(unit, option, index / len(units), bands), []).append(option)
        for kind, choices in by_kind.items():
            cheap = [option for option in choices if option.loss_nats <= _PROBE_NATS / 3]
            chosen = cheap or choices
            (candidates if cheap else costly).setdefault(kind, []).append((unit.name, chosen[len(chosen) // 2]))
    sets = {}
    for kind, members in sorted((costly | candidates).items()):
        if kind == "float":
            continue
        mean = sum(option.loss_nats for _, option in members) / len(members)
        count = len(members) if mean <= 0 else max(1, min(len(members), round(_PROBE_NATS / mean)))
        stride = len(members) / count
        sets[kind] = dict(members[int(number * stride)] for number in range(count))
    return sets


def multipliers(probes: Sequence[Probe]) -> dict[str, float]:
    """Measured over predicted for each class, within bounds that keep one odd probe from ruling the order."""
    return {
        probe.kind: min(_MOST, max(_LEAST, probe.measured_nats / probe.predicted_nats))
        for probe in probes
        if probe.predicted_nats > 0
    }


def corrected(
    units: Sequence[Unit], options: Sequence[Sequence[Option]], factors: Mapping[str, float], bands: int
) -> list[list[Option]]:
    """Options with their prices multiplied by their class's factor (1 where there is none)."""
    return [
        [
            Option(
                form=option.form,
                bytes=option.bytes,
                loss_nats=option.loss_nats * factors.get(kind_of(unit, option, index / len(units), bands), 1.0),
            )
            for option in chain
        ]
        for index, (unit, chain) in enumerate(zip(units, options, strict=True))
    ]


def anchor_prefixes(scoremap: ScoreMap, levels: Sequence[float]) -> list[int]:
    """For each level of summed price in nats, the shortest prefix of the map's moves that reaches it."""
    total, wanted, prefixes = sum(chain[0].loss_nats for chain in scoremap.options), sorted(levels), []
    for count, move in enumerate(scoremap.moves, 1):
        chain = scoremap.options[move.unit]
        total += chain[move.option].loss_nats - chain[move.option - 1].loss_nats
        while wanted and total >= wanted[0]:
            prefixes.append(count)
            wanted.pop(0)
    if scoremap.moves and (not prefixes or prefixes[-1] != len(scoremap.moves)):
        prefixes.append(len(scoremap.moves))
    return sorted(set(prefixes))
