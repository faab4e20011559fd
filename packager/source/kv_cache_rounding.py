"""Keys and values on their way into attention: seen, or rounded as an 8-bit cache rounds them.

A value is stored as round(x / step), -128 to 127, with one step for each channel of each head (of keys and values
apart).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

TOP = 127

Steps = Mapping[int, tuple[Tensor, Tensor]]
"""Layer → (key, value): the step of each channel, (kv_heads, head_dim) float32."""
See = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, keys, values), both (batch, kv_heads, tokens, head_dim) → what attention reads in their place."""


class _Tap(DynamicCache):  # type: ignore[misc]  # transformers' types are not followed
    """A cache that keeps nothing: what would be cached passes through `see`."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self._see = see

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self._see(layer_idx, key_states, value_states)


def cache_keyword(model: torch.nn.Module) -> str:
    """What `model` calls the cache that it is given: `cache`, or before transformers 5.24 `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def tap(model: torch.nn.Module, see: See) -> torch.utils.hooks.RemovableHandle:
    """Let `see` have the keys and values of every forward pass of `model` that is not given a cache, until the handle
    is removed."""

    keyword = cache_keyword(model)

    def hook(
        _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, {keyword: _Tap(see)} | named | {"use_cache": True}

    return model.register_forward_pre_hook(hook, with_kwargs=True)


def rounding(steps: Steps) -> See:
    """Keys and values as the cache's codes stand for them."""

    def rounded(states: Tensor, step: Tensor) -> Tensor:
        step = step.to(states)[:, None]
        return (states / step).round().clamp(-TOP - 1, TOP) * step

    return lambda layer, keys, values: (rounded(keys, steps[layer][0]), rounded(values, steps[layer][1]))


@contextlib.contextmanager
def tapped(model: torch.nn.Module, see: See) -> Iterator[None]:
    """`tap` for as long as the block lasts."""
    handle = tap(model, see)
    try:
        yield
    finally:
        handle.remove()
