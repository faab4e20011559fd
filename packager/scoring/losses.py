"""The loss of a torch model on windows of tokens."""

from __future__ import annotations

import torch


@torch.no_grad()
def token_losses(model: torch.nn.Module, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (length, vocabulary) and the cross-entropy in nats of each token but the first of a (length,) window."""
    logits = model(input_ids=window[None], use_cache=False).logits[0].float()
    return logits, torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="none")
