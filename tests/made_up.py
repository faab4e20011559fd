"""Matrices and moments made up for the maths of scoring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packager.graph.skeleton import Matrix


def correlated(size: int, seed: int, rank: int | None = None) -> Tensor:
    """A moment matrix of correlated inputs of unequal strength; of `rank` at most, where given."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or 2 * size
    mixing = torch.randn(size, size, generator=generator) * torch.logspace(0, -1.5, size)
    inputs = torch.randn(rank, size, generator=generator) @ mixing
    return inputs.T @ inputs / rank


def weights_of(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Random weights whose products are of order one."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / cols**0.5


def matrices_of(model: Any) -> list[Matrix]:
    """What the exporter would name, from the model: enough for architectures that transformers does not pack."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            found.append(
                Matrix(name=name.replace("self_attn", "attn"), rows=module.out_features, cols=module.in_features)
            )
    rows, cols = model.get_input_embeddings().weight.shape
    return [
        *found,
        Matrix(name="model.embed_tokens", rows=rows, cols=cols),
        Matrix(name="lm_head", rows=rows, cols=cols),
    ]
