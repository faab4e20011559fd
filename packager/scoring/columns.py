"""Codes of a matrix set one column after another.

Maths over tensors. Rows share nothing but H, so those of many matrices, or of one on many grids, stand side by side: a
step of the loop costs about the same for a few rows as for thousands. Columns come first here, (K, M), in the order
they are set: one column of all rows lies together.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SLAB = 32


def spread_errors(columns: Tensor, scale: Tensor, zero: Tensor, top: Tensor, upper: Tensor) -> Tensor:
    """Codes (K, M), from 0 to `top` (M,), of `columns` (K, M), which are used up: each is rounded to (code - `zero`) ·
    `scale`, and its error goes to the columns after it through `upper` (K, K), the upper Cholesky factor of H⁻¹.

    Frantar et al. 2023 (arXiv 2210.17323), section 3 and algorithm 1.
    """
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), _SLAB):
        slab = slice(start, start + _SLAB)
        part, local = columns[slab], upper[slab, slab]
        errors = torch.empty_like(part)
        views = zip(part, scale[slab], zero[slab], codes[slab], errors, local.diagonal().tolist(), strict=True)
        for at, (column, step, centre, code, error, pivot) in enumerate(views):
            torch.div(column, step, out=code).add_(centre).round_().clamp_(min=0)
            torch.minimum(code, top, out=code)
            torch.sub(code, centre, out=error).mul_(step)
            torch.sub(column, error, out=error).div_(pivot)
            part[at + 1 :].addr_(local[at, at + 1 :], error, alpha=-1)
        columns[slab.stop :].addmm_(upper[slab, slab.stop :].T, errors, alpha=-1)
    return codes


def look_back(codes: Tensor, error: Tensor, scale: Tensor, top: Tensor, hessian: Tensor) -> Tensor:
    """`codes` (K, M) set anew: each becomes the one, from 0 to `top` (M,), that minimises eᵀ H e for the errors e = w -
    ŵ of its row, `error` (K, M), with all others as they are.

    Coordinate descent, as in QuantEase (Behdin et al. 2023, arXiv 2309.01885). `codes` and `error` are changed in
    place.
    """
    slope = 1 / (scale * hessian.diagonal()[:, None])  # what a code moves by for the gradient of its column
    for start in range(0, len(codes), _SLAB):
        slab = slice(start, start + _SLAB)
        gradient, local = hessian[slab] @ error, hessian[slab, slab]
        steps = torch.empty_like(gradient)
        views = zip(codes[slab], gradient, slope[slab], scale[slab], steps, strict=True)
        for at, (code, pull, reach, step, moved) in enumerate(views):
            torch.addcmul(code, pull, reach, out=moved).round_().clamp_(min=0)
            torch.minimum(moved, top, out=moved)
            moved.sub_(code)
            code.add_(moved)
            moved.mul_(step)
            gradient[at + 1 :].addr_(local[at + 1 :, at], moved, alpha=-1)
        error[slab] -= steps
    return codes
