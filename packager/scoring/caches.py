"""The 8-bit key/value cache: a step for every channel from the range it takes on calibration text, and what rounding costs.

A value is stored as round(x / step), -128 to 127, with one step for each channel of each head (of keys and values apart).
Keys are cached after their rotation by position, which spreads a channel's range over its pair's as positions grow: the
range of both is the largest norm of the pair, which no position exceeds and which short calibration windows show in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from packager.graph.caches import CacheFacts
from packager.identity import CacheScore
from packager.scoring.ledger import Ledger
from packager.scoring.probes import Observer

_TOP = 127
_LEAST_STEP = 1e-6

Steps = Mapping[int, tuple[Tensor, Tensor]]
"""Layer → (key, value): the step of each channel, (kv_heads, head_dim) float32."""
See = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys, values), both (batch, kv_heads, tokens, head_dim) → what attention reads in their place."""


class _Tap(DynamicCache):  # type: ignore[misc]  # transformers' types are not followed
    """A cache that keeps nothing: what would be cached passes through `see`."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._see(layer_idx, key_states, value_states)


def tap(model: torch.nn.Module, see: See) -> torch.utils.hooks.RemovableHandle:
    """Let `see` have the keys and values of every forward pass of `model` that is not given a cache, until the handle is removed."""

    def hook(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, {"past_key_values": _Tap(see)} | named | {"use_cache": True}

    return model.register_forward_pre_hook(hook, with_kwargs=True)


def rounding(steps: Steps) -> See:
    """Keys and values as the cache's codes stand for them."""

    def rounded(states: Tensor, step: Tensor) -> Tensor:
        step = step.to(states)[:, None]
        return (states / step).round().clamp(-_TOP - 1, _TOP) * step

    return lambda layer, keys, values: (rounded(keys, steps[layer][0]), rounded(values, steps[layer][1]))


@torch.no_grad()
def measure_steps(model: torch.nn.Module, windows: Tensor, facts: CacheFacts) -> dict[int, tuple[Tensor, Tensor]]:
    """The step of every channel of every layer, from the ranges on `windows` (n, length) of token ids."""
    ranges: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = [states.float().amax((0, 2)) for states in (pair_norms(keys, facts.turned, interleaved=facts.interleaved), values.abs())]
        if layer in ranges:
            found = [torch.maximum(one, other) for one, other in zip(found, ranges[layer], strict=True)]
        ranges[layer] = (found[0], found[1])
        return keys, values

    with _tapped(model, see):
        for window in windows.to(next(model.parameters()).device):
            model(input_ids=window[None])
    return {layer: (_step(keys), _step(values)) for layer, (keys, values) in ranges.items()}


def _step(width: Tensor) -> Tensor:
    return (width / _TOP).clamp(min=_LEAST_STEP).cpu()


def pair_norms(keys: Tensor, turned: int, *, interleaved: bool) -> Tensor:
    """|keys| (…, head_dim), where each of the first `turned` channels has the norm of the pair that positions turn it in."""
    moving, still = keys[..., :turned], keys[..., turned:]
    if interleaved:
        moving = torch.hypot(moving[..., ::2], moving[..., 1::2]).repeat_interleave(2, dim=-1)
    else:
        moving = torch.hypot(*moving.chunk(2, dim=-1)).repeat(*[1] * (keys.dim() - 1), 2)
    return torch.cat([moving, still.abs()], dim=-1)


def score_cache(
    model: torch.nn.Module, facts: CacheFacts, windows: Tensor, heldout: Tensor, ledger: Ledger
) -> tuple[CacheScore, dict[int, tuple[Tensor, Tensor]]]:
    """What a cache of 8-bit codes costs on `heldout`, with steps from `windows`; and the steps, none where it is refused."""
    if facts.refusal:
        return CacheScore(loss_nats=0.0, refusal=facts.refusal), {}
    observer = Observer(model, heldout)
    steps = measure_steps(model, windows, facts)
    if set(steps) != set(facts.layers):
        return CacheScore(loss_nats=0.0, refusal=f"{type(model).__name__} caches {len(steps)} layers, its exported graph {len(facts.layers)}"), {}
    with _tapped(model, rounding(steps)):
        divergence, _ = ledger.recall("8-bit cache", observer.measure)
    return CacheScore(loss_nats=max(0.0, divergence)), steps


@contextlib.contextmanager
def _tapped(model: torch.nn.Module, see: See) -> Iterator[None]:
    handle = tap(model, see)
    try:
        yield
    finally:
        handle.remove()
