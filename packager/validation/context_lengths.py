"""Which prompts a bundle is compared with its reference on: how long they are.

A prompt that fills the context, and one a little past every length at which the configuration changes how positions or
windows count. The rule has no clock in it, so that the same bundle gets the same golden file on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from packager.scoring.graph_check import thresholds

MOST_FILLED = 8192
"""Tokens of the prompt that stands for a larger context: about as many as the reference reads for the held-out loss."""
MOST_PASSED = 32768
"""Tokens of the longest prompt that is made to pass a length of the configuration."""
BEYOND = 40
"""Tokens by which a prompt passes such a length."""
_MOST_SCORES = 1 << 29
"""Attention scores of one layer that the reference may hold at once, 2 GiB of floats, where they are held at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextLengths:
    """`prompts`: the length that a prompt passes (0: it fills the context) → its tokens. `left_out`: the lengths that
    would need a prompt too long for the reference."""

    prompts: Mapping[int, int]
    left_out: tuple[int, ...]


def context_lengths(config: PretrainedConfig, prompt_tokens: int, context_tokens: int) -> ContextLengths:
    """The prompts for a bundle of `config` that takes prompts of `prompt_tokens` in a context of `context_tokens`."""
    most_held = MOST_PASSED
    if getattr(config, "_attn_implementation", None) == "eager":
        most_held = min(most_held, math.isqrt(_MOST_SCORES // config.num_attention_heads))
    found, left_out = {0: min(prompt_tokens, MOST_FILLED, most_held)}, []
    for length in thresholds(config):
        tokens = min(length + BEYOND, context_tokens - 1)
        if tokens <= length:
            continue  # no prompt of this bundle passes it
        if tokens > most_held:
            left_out.append(length)
        else:
            found[length] = tokens
    return ContextLengths(prompts=found, left_out=tuple(left_out))
