"""Low rank under curvature: the factors that change the loss least.

With Cholesky factors G = L Lᵀ and H = R Rᵀ, ½ tr(G E H Eᵀ) = ½ ‖Lᵀ E R‖²: the best rank-r approximation is the
truncated SVD of Lᵀ W R, with both factors undone (Eckart-Young in the curvature's norm). Dropping component i costs
½ σᵢ².

A matrix of rank r is also r of its rows and what the others are of them: `pivot_rows` picks rows for which these
coefficients are small, so that an error in a chosen row does not grow in the rows made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_DAMPING = 1e-3
_LARGEST_COEFFICIENT = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Spectrum:
    """`left` (N, k) and `right` (k, K) with W = left · right at full rank, columns and rows by falling `costs` (k,):
    what dropping each adds to the loss, in nats per token."""

    left: Tensor
    right: Tensor
    costs: Tensor


def decompose(weights: Tensor, hessian: Tensor, gradient: Tensor) -> Spectrum:
    """The curvature-ordered factorisation of (N, K) `weights`. Singular H or G are damped, not refused."""
    left_root = _root(gradient)
    right_root = _root(hessian)
    u, sigma, v = torch.linalg.svd(left_root.T @ weights @ right_root, full_matrices=False)
    balance = sigma.clamp(min=0).sqrt()
    left = torch.linalg.solve_triangular(left_root.T, u * balance, upper=True)
    right = torch.linalg.solve_triangular(right_root, balance[:, None] * v, upper=False, left=False)
    return Spectrum(left=left, right=right, costs=0.5 * sigma.square())


def refit_left(weights: Tensor, right: Tensor, hessian: Tensor) -> Tensor:
    """The (N, r) factor that with a given (r, K) `right` approximates W best under H: W H Rᵀ (R H Rᵀ)⁻¹."""
    reach = right @ hessian
    gram = reach @ right.T
    gram = gram + 1e-6 * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), device=gram.device)
    solved: Tensor = torch.linalg.solve(gram, reach @ weights.T)
    return solved.T


def pivot_rows(left: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of (N, r) `left` in an order that begins with r rows that span it, and the coefficients (N - r, r) that
    make the others of them, none of magnitude above 2.

    Gaussian elimination with row pivoting finds rows that span; then, as long as a coefficient is too large, its row
    takes the place of the one it is a multiple of, which multiplies the volume of the chosen rows by it (Goreinov et
    al. 2010, "How to find a good submatrix"; Knuth 1985). A rank below r is no error.
    """
    count, rank = left.shape
    lower, pivots, _ = torch.linalg.lu_factor_ex(left.double())
    order = list(range(count))
    for position, chosen in enumerate((pivots - 1).tolist()):
        order[position], order[chosen] = order[chosen], order[position]
    rows = torch.tensor(order, device=left.device)
    coefficients: Tensor = torch.linalg.solve_triangular(
        lower[:rank].tril(-1), lower[rank:], upper=False, left=False, unitriangular=True
    )
    for _ in range(count if rank < count else 0):
        largest = int(coefficients.abs().argmax())
        other, basis = divmod(largest, rank)
        pivot = coefficients[other, basis].clone()
        if abs(float(pivot)) <= _LARGEST_COEFFICIENT:
            break
        change = coefficients[other].clone()
        change[basis] -= 1
        coefficients.addr_(coefficients[:, basis].clone(), change, alpha=-1 / float(pivot))
        coefficients[other] = -change / pivot
        coefficients[other, basis] += 1
        rows[[basis, rank + other]] = rows[[rank + other, basis]]
    return rows, coefficients.float()


def _root(moment: Tensor) -> Tensor:
    """Lower Cholesky factor of the damped moment."""
    size = moment.shape[0]
    mean = moment.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny * 2**40)
    eye = torch.eye(size, device=moment.device)
    damping = _DAMPING
    lower: Tensor
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex(moment + damping * mean * eye)
        if not int(failed):
            return lower
        damping *= 10
    return eye * mean.sqrt()
