"""The 8-bit key/value cache: a step for every channel from the range it takes on calibration text, and what rounding
costs.

A value is stored as round(x / step), -128 to 127, with one step for each channel of each head (of keys and values
apart). Keys are cached after their rotation by position, which spreads a channel's range over its pair's as positions
grow: the range of both is the largest norm of the pair, which no position exceeds and which short calibration windows
show in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packager.graph.kv_cache_codes import CacheFacts
from packager.scoremap.identity import CacheScore
from packager.scoring.ledger import Ledger
from packager.scoring.probes import Observer
from packager.source.kv_cache_rounding import TOP, rounding, tapped

_LEAST_STEP = 1e-6


@torch.no_grad()
def measure_steps(model: torch.nn.Module, windows: Tensor, facts: CacheFacts) -> dict[int, tuple[Tensor, Tensor]]:
    """The step of every channel of every layer, from the ranges on `windows` (n, length) of token ids."""
    ranges: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            states.float().amax((0, 2))
            for states in (pair_norms(keys, facts.rotary_channels, interleaved=facts.rotary_interleaved), values.abs())
        ]
        if layer in ranges:
            found = [torch.maximum(one, other) for one, other in zip(found, ranges[layer], strict=True)]
        ranges[layer] = (found[0], found[1])
        return keys, values

    with tapped(model, see):
        for window in windows.to(next(model.parameters()).device):
            model(input_ids=window[None])
    return {layer: (_step(keys), _step(values)) for layer, (keys, values) in ranges.items()}


def _step(width: Tensor) -> Tensor:
    return (width / TOP).clamp(min=_LEAST_STEP).cpu()


def pair_norms(keys: Tensor, turned: int, *, interleaved: bool) -> Tensor:
    """|keys| (…, head_dim), where each of the first `turned` channels has the norm of the pair that positions turn it
    in."""
    moving, still = keys[..., :turned], keys[..., turned:]
    if interleaved:
        moving = torch.hypot(moving[..., ::2], moving[..., 1::2]).repeat_interleave(2, dim=-1)
    else:
        moving = torch.hypot(*moving.chunk(2, dim=-1)).repeat(*[1] * (keys.dim() - 1), 2)
    return torch.cat([moving, still.abs()], dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCachePrice:
    """What a cache of 8-bit codes costs, and its `steps` (keys, values) of every channel by layer, none where it is
    refused."""

    score: CacheScore
    steps: dict[int, tuple[Tensor, Tensor]]


def price_kv_cache(
    model: torch.nn.Module, facts: CacheFacts, windows: Tensor, heldout: Tensor, ledger: Ledger
) -> KvCachePrice:
    """What a cache of 8-bit codes costs on `heldout`, with steps from `windows`."""
    if facts.refusal:
        return _refused(facts.refusal)
    observer = Observer(model, heldout)
    steps = measure_steps(model, windows, facts)
    if set(steps) != set(facts.layers):
        return _refused(f"{type(model).__name__} caches {len(steps)} layers, its exported graph {len(facts.layers)}")
    with tapped(model, rounding(steps)):
        divergence, _ = ledger.recall("8-bit cache", observer.measure)
    return KvCachePrice(score=CacheScore(loss_nats=max(0.0, divergence)), steps=steps)


def _refused(reason: str) -> KvCachePrice:
    return KvCachePrice(score=CacheScore(loss_nats=0.0, refusal=reason), steps={})
