"""The loss of a torch model on windows of tokens."""

from __future__ import annotations

import torch


@torch.no_grad()
def mean_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Mean cross-entropy in nats per token over (n, length) windows, each token predicted from those before it."""
    total, count = 0.0, 0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return total / count
