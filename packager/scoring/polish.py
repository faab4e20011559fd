"""Tuning a chosen size against the original model: every block's scale moves, no byte is added.

Codes were rounded and scales fitted matrix by matrix. Here all scales of a model are trained together to bring its
predictions back to the original's: KL(original ‖ packed) on calibration text (distillation, Hinton et al. 2015;
training the step sizes alone is the second phase of EfficientQAT, Chen et al. 2024, arXiv 2407.11062). It needs the
original model and minutes for one size, so it is no part of the map.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import parametrize

from packager.forms.codes import CodesForm
from packager.forms.registry import Form
from packager.progress import Progress
from packager.scoring.probes import Observer, rounding_hook
from packager.source.unit_weights import Source

Arrays = Mapping[str, NDArray[np.generic]]

_RATE = 1e-3
_WARM_STEPS = 5
_WINDOWS_A_STEP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Polish:
    """Tuned `scales` (rows, blocks) float32 by unit, and the divergence in nats per token on held-out text before and
    after. `scales` is empty where nothing is stored in blocks, or tuning did not bring the model closer."""

    scales: dict[str, NDArray[np.float32]]
    before_nats: float
    after_nats: float
    steps: int


class _Part(torch.nn.Module):
    """Rows of one matrix: codes (rows, cols) with their zero points taken off, and one scale for each block."""

    def __init__(self, source: Source, form: CodesForm, arrays: Arrays) -> None:
        super().__init__()
        rows, cols = source.unit.rows, source.unit.cols
        self.name, self.rows, self.block = source.unit.name, slice(source.start, source.stop), form.block
        whole = form.dequantize({**arrays, "scales": np.ones_like(arrays["scales"])}, rows, cols)
        self.codes = torch.from_numpy(whole.astype(np.int16))
        self.scales = torch.from_numpy(np.asarray(arrays["scales"], np.float32))
        self.change = torch.nn.Parameter(torch.zeros_like(self.scales))

    def tuned(self) -> Tensor:
        return self.scales * (1 + self.change)

    def weights(self) -> Tensor:
        spread = self.tuned().repeat_interleave(self.block, dim=1)[:, : self.codes.shape[1]]
        return self.codes * spread


class _Tunable(torch.nn.Module):
    """A module's weight with some of its rows made from codes and trained scales."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, weight: Tensor) -> Tensor:
        if len(self.parts) == 1 and self.parts[0].codes.shape == weight.shape:
            return self.parts[0].weights()  # type: ignore[operator,no-any-return]  # ModuleList forgets its type
        whole = weight.clone()
        for part in self.parts:
            whole[part.rows] = part.weights()  # type: ignore[index,operator]  # as above
        return whole


def polish(
    original: torch.nn.Module,
    packed: torch.nn.Module,
    sources: Sequence[Source],
    forms: Mapping[str, Form],
    load: Callable[[Source, Form], Arrays],
    *,
    windows: Tensor,
    heldout: Tensor,
    seconds: float,
    rounds_inputs: bool,
    progress: Progress,
) -> Polish:
    """Tune the scales of `packed`'s decoder matrices for `seconds`, windows (n, length) of text in turn.

    `packed` holds the weights of the chosen `forms` (by unit name) and is left with hooks and trained parts on: it is
    of no use afterwards. `load` gives the stored tensors of a unit's form. The vocabulary stays as it is.
    """
    parts = [_Part(source, form, load(source, form)) for source, form in _tunable(sources, forms)]
    by_module: dict[str, list[_Part]] = {}
    for part, (source, form) in zip(parts, _tunable(sources, forms), strict=True):
        by_module.setdefault(source.module, []).append(part)
        block = form.activation_block
        if rounds_inputs and block is not None and len(by_module[source.module]) == 1:
            packed.get_submodule(source.module).register_forward_pre_hook(rounding_hook(block))
    for parameter in packed.parameters():
        parameter.requires_grad_(False)
    for name, members in by_module.items():
        parametrize.register_parametrization(packed.get_submodule(name), "weight", _Tunable(members), unsafe=True)
    observer = Observer(original, heldout)
    before, _ = observer.measure(packed)
    if not parts:
        return Polish(scales={}, before_nats=before, after_nats=before, steps=0)
    steps = _train(original, packed, [part.change for part in parts], windows, seconds, progress)
    after, _ = observer.measure(packed)
    better = after < before
    scales = {part.name: part.tuned().detach().numpy() for part in parts} if better else {}
    return Polish(scales=scales, before_nats=before, after_nats=after if better else before, steps=steps)


def _tunable(sources: Sequence[Source], forms: Mapping[str, Form]) -> Iterator[tuple[Source, CodesForm]]:
    for source in sources:
        form = forms[source.unit.name]
        if source.unit.kind == "linear" and isinstance(form, CodesForm):
            yield source, form


def _train(
    original: torch.nn.Module,
    packed: torch.nn.Module,
    changes: Sequence[Tensor],
    windows: Tensor,
    seconds: float,
    progress: Progress,
) -> int:
    """Adam on the relative changes, the rate rising over five steps and falling to zero as time runs out."""
    optimiser = torch.optim.Adam(changes, lr=_RATE, betas=(0.9, 0.95))
    progress.phase("polishing block scales against the original model", 100)
    started, shown, step = time.monotonic(), 0, 0
    while (spent := (time.monotonic() - started) / seconds) < 1:
        picked = torch.arange(step * _WINDOWS_A_STEP, (step + 1) * _WINDOWS_A_STEP) % len(windows)
        for group in optimiser.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / _WARM_STEPS) * 0.5 * (1 + math.cos(math.pi * spent))
        optimiser.zero_grad()
        torch.autograd.backward(_divergence(original, packed, windows[picked]))
        optimiser.step()
        step += 1
        progress.advance(int(100 * spent) - shown)
        shown = int(100 * spent)
    progress.advance(100 - shown)
    return step


def _divergence(original: torch.nn.Module, packed: torch.nn.Module, ids: Tensor) -> Tensor:
    """KL(original ‖ packed) in nats per token on (n, length) token ids."""
    with torch.no_grad():
        aim = torch.log_softmax(original(input_ids=ids, use_cache=False).logits.float(), dim=-1)
    with torch.enable_grad():
        found = torch.log_softmax(packed(input_ids=ids, use_cache=False).logits.float(), dim=-1)
        return torch.nn.functional.kl_div(found, aim, reduction="none", log_target=True).sum(-1).mean()
