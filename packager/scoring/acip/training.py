"""ACIP, the published method: train gates and adapters until enough directions are shut, then the adapters alone.

Every linear layer becomes left · gates · right beside a low-rank adapter. Each optimiser step takes the loss on packed
windows of calibration text plus λ Σ relu(masks); λ grows. What goes when is the score (`gates.total_order`). When the
kept share of the layers' elements reaches the stop ratio, the masks freeze, layers that are no smaller in factors
become whole again, and the adapters are tuned to what is left. Masks, adapters and the optimiser's state are float32.

Training writes its state to a safetensors file from time to time and goes on from there: the same seed gives the same
result however often it was stopped.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packager.errors import CalibrationError, UsageError
from packager.progress import Progress
from packager.scoremap.settings import AcipSettings
from packager.scoring.acip.gates import OPEN, SCALE, Fate, Schedule, gate, kept_share, penalty
from packager.source.unit_weights import Source

_MOST_ROUNDS = 4
_SAVE_SECONDS = 30.0
_PASS_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A unit's factorisation, `left` (N, k) and `right` (k, K) with W = c · left · right, directions by falling `costs`
    (k,): what dropping each adds to the loss under the unit's curvature, in nats per token."""

    left: Tensor
    right: Tensor
    costs: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What is added to W: `up` (N, a) · `down` (a, K), LoRA's scale included."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What training came to: the fate of each unit's directions, its tuned adapter, and how many steps pruned."""

    fates: dict[str, Fate]
    adapters: dict[str, Adapter]
    pruning_steps: int


class _Part(nn.Module):
    """One unit's rows of a layer: its gated factors and its adapter."""

    def __init__(self, source: Source, start: Start, settings: AcipSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.name = source.unit.name
        self.shape = (source.unit.rows, source.unit.cols)
        device = start.left.device
        self.left, self.right = start.left, start.right
        count, rank = start.right.shape[0], settings.adapter_rank
        bound = 1 / math.sqrt(source.unit.cols)
        down = (2 * torch.rand(rank, source.unit.cols, generator=generator) - 1) * bound
        self.mask = nn.Parameter(torch.full((count,), SCALE, device=device))
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(source.unit.rows, rank, device=device))
        self.pruned = torch.full((count,), OPEN, dtype=torch.int32, device=device)
        self.fell_to = torch.zeros(count, device=device)
        self.settings = settings
        self.frozen: tuple[Tensor, Tensor] | Tensor | None = None
        self.adapted = True

    @property
    def rank(self) -> int:
        """Directions still open."""
        return int((self.mask > 0).sum())

    @property
    def whole(self) -> bool:
        """Whether the unit takes no fewer elements in factors, its adapter folded in, than as it was."""
        rows, cols = self.shape
        return (self.rank + self.settings.adapter_rank) * (rows + cols) >= rows * cols

    def note(self, step: int) -> None:
        """Record what `step` has shut, and keep shut what was."""
        with torch.no_grad():
            shut = self.pruned != OPEN
            self.mask[shut] = self.mask[shut].clamp(max=0)
            fresh = (self.mask <= 0) & ~shut
            self.pruned[fresh] = step
            self.fell_to[fresh] = self.mask[fresh]

    def freeze(self, *, adapt_whole: bool) -> None:
        """No gate moves any more: what is shut is left out, unless the unit is whole again."""
        self.mask.requires_grad_(False)
        kept = self.mask > 0
        if self.whole:
            self.frozen, self.adapted = self.left @ self.right * SCALE, adapt_whole
        else:
            self.frozen = self.left[:, kept] * SCALE, self.right[kept]

    def forward(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        match self.frozen:
            case None:
                result = nn.functional.linear(nn.functional.linear(inputs, self.right) * gate(self.mask), self.left)
            case (left, right):
                result = nn.functional.linear(nn.functional.linear(inputs, right), left)
            case Tensor() as weight:
                result = nn.functional.linear(inputs, weight)
        if not self.adapted:
            return result
        kept = torch.rand(inputs.shape, generator=generator, device=inputs.device) >= self.settings.dropout
        noisy = inputs * kept / (1 - self.settings.dropout)
        added: Tensor = nn.functional.linear(nn.functional.linear(noisy, self.down), self.up)
        return result + self.settings.adapter_scale * added


class _GatedLinear(nn.Module):
    """Stands in for a linear layer: the parts that are its rows, one below the other, and its bias."""

    def __init__(self, parts: Sequence[_Part], bias: Tensor | None, generator: torch.Generator) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.bias = bias
        self.generator = generator

    def forward(self, inputs: Tensor) -> Tensor:
        result = torch.cat([part(inputs.float(), self.generator) for part in self.parts], dim=-1).to(inputs.dtype)
        return result if self.bias is None else result + self.bias


@contextlib.contextmanager
def _gated(
    model: nn.Module, sources: Sequence[Source], starts: Mapping[str, Start], settings: AcipSettings, seed: int
) -> Iterator[_Training]:
    """The model with every source's layer gated; layers and gradient flags come back at the end."""
    device = next(model.parameters()).device
    initial, noise = torch.Generator().manual_seed(seed), torch.Generator(device=device)
    parts = {source.unit.name: _Part(source, starts[source.unit.name], settings, initial) for source in sources}
    layers: dict[str, list[Source]] = {}
    for source in sources:
        layers.setdefault(source.module, []).append(source)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, members in layers.items():
            owner, attribute = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            layer: Any = model.get_submodule(name)
            originals.append((owner, attribute, layer))
            ordered = [parts[source.unit.name] for source in sorted(members, key=lambda source: source.start)]
            setattr(owner, attribute, _GatedLinear(ordered, getattr(layer, "bias", None), noise))
        yield _Training(model, list(parts.values()), settings, noise)
    finally:
        for owner, attribute, layer in originals:
            setattr(owner, attribute, layer)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Training:
    """A gated model being trained: its parts, the optimiser, and where it is."""

    def __init__(
        self, model: nn.Module, parts: Sequence[_Part], settings: AcipSettings, noise: torch.Generator
    ) -> None:
        self.model, self.parts, self.settings, self.noise = model, parts, settings, noise
        self.pruning_steps, self.tuning_steps, self.stopped = 0, 0, False
        adapters = [parameter for part in parts for parameter in (part.down, part.up)]
        groups = [
            {"params": [part.mask for part in parts], "lr": settings.mask_rate * settings.speed},
            {"params": adapters, "lr": settings.adapter_rate},
        ]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)

    @property
    def share(self) -> float:
        """Elements kept of all the parts', adapters folded in."""
        return kept_share(
            [part.shape for part in self.parts], [part.rank for part in self.parts], self.settings.adapter_rank
        )

    def step(self, windows: Tensor, seed: int) -> None:
        """One optimiser step over (n, length) token ids, in passes that bound the memory."""
        number = self.pruning_steps + self.tuning_steps
        self.noise.manual_seed(seed * 1_000_003 + number)
        self.optimiser.zero_grad()
        rows = max(1, _PASS_TOKENS // windows.shape[1])
        targets = windows.numel() - len(windows)
        for ids in torch.split(windows.to(self.noise.device), rows):
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / targets
            if not bool(torch.isfinite(loss)):
                raise CalibrationError(
                    f"ACIP diverged at step {number}: the loss is {float(loss.detach())}; lower the adapter's rate or "
                    "give it more steps"
                )
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
        if self.stopped:
            self.optimiser.step()
            self.tuning_steps += 1
            return
        pull = Schedule.of(self.settings).at(number) * penalty([part.mask for part in self.parts])
        pull.backward()  # type: ignore[no-untyped-call]  # as above
        self.optimiser.step()
        for part in self.parts:
            part.note(number)
        self.pruning_steps += 1

    def stop(self, *, adapt_whole: bool) -> None:
        """Freeze the masks as they are."""
        self.stopped = True
        for part in self.parts:
            part.freeze(adapt_whole=adapt_whole)

    def save(self, path: Path) -> None:
        """Everything that training goes on from, in one step."""
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            tensors |= {
                f"{part.name}|{key}": value.detach()
                for key, value in (("pruned", part.pruned), ("fell_to", part.fell_to))
            }
            for key, parameter in part.named_parameters():
                tensors[f"{part.name}|{key}"] = parameter.detach()
                tensors |= {
                    f"{part.name}|{key}|{moment}": value for moment, value in self.optimiser.state[parameter].items()
                }
        described = {"pruning_steps": self.pruning_steps, "tuning_steps": self.tuning_steps, "stopped": self.stopped}
        temporary = path.with_suffix(".writing")
        save_file(
            {key: value.cpu().contiguous() for key, value in tensors.items()},
            temporary,
            metadata={"training": json.dumps(described)},
        )
        temporary.rename(path)

    def load(self, path: Path, *, adapt_whole: bool) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["training"])
        tensors = load_file(path, device=str(self.noise.device))
        self.pruning_steps, self.tuning_steps = described["pruning_steps"], described["tuning_steps"]
        with torch.no_grad():
            for part in self.parts:
                part.pruned, part.fell_to = tensors[f"{part.name}|pruned"], tensors[f"{part.name}|fell_to"]
                for key, parameter in part.named_parameters():
                    parameter.copy_(tensors[f"{part.name}|{key}"])
                    moments = {name: tensors[f"{part.name}|{key}|{name}"] for name in ("exp_avg", "exp_avg_sq")}
                    self.optimiser.state[parameter] = moments | {"step": tensors[f"{part.name}|{key}|step"].cpu()}
        if described["stopped"]:
            self.stop(adapt_whole=adapt_whole)

    def outcome(self) -> Outcome:
        """What training came to, on the CPU."""
        fates, adapters = {}, {}
        for part in self.parts:
            mask, fell_to = part.mask.detach().cpu().numpy(), part.fell_to.cpu().numpy()
            fates[part.name] = Fate(shape=part.shape, mask=mask, pruned=part.pruned.cpu().numpy(), fell_to=fell_to)
            up, down = part.up.detach().cpu(), part.down.detach().cpu()
            adapters[part.name] = Adapter(up=self.settings.adapter_scale * up, down=down)
        return Outcome(fates=fates, adapters=adapters, pruning_steps=self.pruning_steps)


def check_reachable(shapes: Sequence[tuple[int, int]], settings: AcipSettings) -> None:
    """UsageError with the minimum where even without any direction the adapters alone keep more than the stop ratio."""
    least = kept_share(shapes, [0] * len(shapes), settings.adapter_rank)
    if least > settings.stop_ratio:
        raise UsageError(
            f"ACIP's stop ratio {settings.stop_ratio} cannot be reached: with no direction left, adapters of rank "
            f"{settings.adapter_rank} alone keep "
            f"{least:.3f} of the layers' elements; give a stop ratio above that, or a smaller adapter"
        )


def train(
    model: nn.Module,
    sources: Sequence[Source],
    starts: Mapping[str, Start],
    windows: Tensor,
    settings: AcipSettings,
    *,
    seed: int,
    adapt_whole: bool,
    state: Path,
    progress: Progress,
) -> Outcome:
    """Prune and tune `sources` of `model` on `windows` (n, length) of token ids; the model is left as it was.

    `starts` lie on the model's device. `adapt_whole` lets the adapters of units that stay whole take part. `state` is
    the file that training is resumed from. Raises CalibrationError when the stop ratio is not reached in four times the
    steps.
    """
    check_reachable([(source.unit.rows, source.unit.cols) for source in sources], settings)
    batches = _Batches(windows, settings.step_tokens, seed)
    with _gated(model, sources, starts, settings, seed) as training:
        if state.is_file():
            training.load(state, adapt_whole=adapt_whole)
        saved = time.monotonic()

        def advance() -> None:
            nonlocal saved
            training.step(batches.at(training.pruning_steps + training.tuning_steps), seed)
            if time.monotonic() - saved >= _SAVE_SECONDS:
                training.save(state)
                saved = time.monotonic()
            progress.advance()

        if not training.stopped:
            progress.phase("shutting gates (ACIP)", settings.steps)
            progress.advance(training.pruning_steps)
            while training.share > settings.stop_ratio:
                if training.pruning_steps >= _MOST_ROUNDS * settings.steps:
                    raise CalibrationError(
                        f"ACIP keeps {training.share:.3f} of the layers' elements after {training.pruning_steps} "
                        f"steps, expected {settings.stop_ratio}: give it more steps, or a higher stop ratio"
                    )
                advance()
            training.stop(adapt_whole=adapt_whole)
            training.save(state)
        progress.phase("tuning adapters (ACIP)", settings.tuning_steps)
        progress.advance(training.tuning_steps)
        while training.tuning_steps < settings.tuning_steps:
            advance()
        training.save(state)
        return training.outcome()


class _Batches:
    """Packed windows cut to the step's length, in an order that the seed and the step alone decide."""

    def __init__(self, windows: Tensor, step_tokens: int, seed: int) -> None:
        length = min(windows.shape[1], step_tokens)
        self._rows = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
        self._count = max(1, step_tokens // length)
        self._seed = seed

    def at(self, step: int) -> Tensor:
        """The (n, length) token ids of an optimiser step."""
        first = step * self._count
        return torch.stack([self._row(index) for index in range(first, first + self._count)])

    def _row(self, index: int) -> Tensor:
        epoch, position = divmod(index, len(self._rows))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return self._rows[torch.randperm(len(self._rows), generator=generator)[position]]
