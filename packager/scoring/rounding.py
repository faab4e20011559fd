"""Rounding a matrix to blocks of bits so that the outputs it makes change least.

Maths over tensors; nothing here knows a model. W is (N, K), H = E[x xᵀ] is (K, K).

- GPTQ: Frantar et al. 2023 (arXiv 2210.17323), section 3: columns are rounded one by one and the error of each is
  spread over the columns not yet rounded, through the Cholesky factor of H⁻¹. The grids of all blocks are fixed before,
  so that columns can be rounded in any order without moving in the file: the largest of H's diagonal first.
- Coordinate descent: GPTQ never looks back, so each code is then set once more to what is best with all others as they
  are (as in QuantEase, Behdin et al. 2023, arXiv 2309.01885): the error never grows.
- Clip search: each block's scale is the best of a grid of shrunken ranges under the diagonal of H.
- Scale refit: with the codes fixed, the scales of a row minimise (w - ŵ) H (w - ŵ)ᵀ, a linear system of as many
  unknowns as the row has blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packager.forms.codes import CodesForm
from packager.scoring.columns import look_back, spread_errors

_DAMPING = 0.01
_GRID_ELEMENTS = 1 << 24
_WORK_ELEMENTS = 1 << 22
# By bits: how many ranges are tried for a block, down to which share of its full one. Judged by H's diagonal alone more
# shrinking looks better than it proves once errors are spread.
_CLIPS = {2: (10, 0.45), 4: (5, 0.85), 6: (4, 0.8), 8: (1, 1.0)}
_SWEEPS = {2: 2, 4: 1, 6: 1, 8: 0}  # of coordinate descent, by bits: where they pay

_Entry = TypeVar("_Entry")


def _by_bits(table: Mapping[int, _Entry], form: CodesForm) -> _Entry:
    """The entry of `table` for codes of as many bits, or of the next fewer that it knows."""
    return table[max(bits for bits in table if bits <= form.bits)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """codes (N, K) uint8, scales (N, blocks) float32, zeros (N, blocks) uint8 or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """How the error of a column is spread under `hessian` (K, K): `order` (K,) in which columns are rounded, and
    `upper` (K, K), the upper Cholesky factor of the inverse of H so ordered."""

    hessian: Tensor
    order: Tensor
    upper: Tensor


def feedback(hessian: Tensor, damping: float = _DAMPING) -> Feedback:
    """The feedback of H, columns by falling diagonal."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return Feedback(hessian=hessian, order=order, upper=inverse_factor(hessian[order][:, order], damping))


def round_to(weights: Tensor, forms: Sequence[CodesForm], spread: Feedback) -> Iterator[Rounded]:
    """(N, K) `weights` rounded to the codes of each of `forms`, their scales refitted. As many forms are worked on at
    once as keep that small in memory."""
    count = max(1, _WORK_ELEMENTS // max(1, weights.numel()))
    for start in range(0, len(forms), count):
        yield from _round_at_once(weights, forms[start : start + count], spread)


def _round_at_once(weights: Tensor, forms: Sequence[CodesForm], spread: Feedback) -> list[Rounded]:
    target = weights.float() @ spread.hessian
    rounded = [
        refit_scales(one, target, spread.hessian, form)
        for one, form in zip(gptq(weights, spread, forms), forms, strict=True)
    ]
    sweeps = [_by_bits(_SWEEPS, form) for form in forms]
    for sweep in range(max(sweeps)):
        again = [at for at, count in enumerate(sweeps) if count > sweep]
        fresh = descend(weights, [rounded[at] for at in again], spread, [forms[at] for at in again])
        for at, one in zip(again, fresh, strict=True):
            rounded[at] = refit_scales(one, target, spread.hessian, forms[at])
    return rounded


def inverse_factor(hessian: Tensor, damping: float = _DAMPING) -> Tensor:
    """Upper Cholesky factor of (H + damping · mean diagonal)⁻¹, (K, K) float32.

    Inputs that never fire (zero rows of H) get a unit diagonal: their columns round to nearest. Damping grows
    tenfold until the factorisation succeeds, so a singular H does not fail.
    """
    size = hessian.shape[0]
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    base = hessian.double()
    base = base + torch.diag(dead.double())
    mean = float(diagonal[~dead].double().mean()) if bool((~dead).any()) else 1.0
    eye = torch.eye(size, dtype=torch.float64, device=hessian.device)
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex(base + damping * mean * eye)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                factor: Tensor = upper.float()
                return factor
        damping *= 10
    return torch.eye(size, device=hessian.device)


def block_grid(weights: Tensor, importance: Tensor, form: CodesForm) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block by clip search.

    `weights` (N, B, g) and `importance` (B, g), the diagonal of H. Returns scales (N, B) and zero points (N, B), both
    float32. Without `form.zeros` the zero point is `form.centre` and the scale may be negative, which lets the longer
    side of the code range serve the larger tail.
    """
    top = 2**form.bits - 1
    low = weights.amin(-1).clamp(max=0)
    high = weights.amax(-1).clamp(min=0)
    steps, floor = _by_bits(_CLIPS, form)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(steps):
        shrink = 1.0 - (1.0 - floor) * step / max(steps - 1, 1)
        for scale, zero in _candidates(low * shrink, high * shrink, form, top):
            codes = (weights / scale[..., None] + zero[..., None]).round_().clamp_(0, top)
            error = ((codes - zero[..., None]) * scale[..., None] - weights).square_().mul_(importance).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _candidates(low: Tensor, high: Tensor, form: CodesForm, top: int) -> list[tuple[Tensor, Tensor]]:
    tiny = torch.finfo(torch.float32).tiny * 2**20
    if form.zeros:
        scale = ((high - low) / top).clamp(min=tiny)
        return [(scale, (-low / scale).round().clamp(0, top))]
    centre = torch.full_like(low, form.centre)
    reach = torch.where(high >= -low, high, low)  # the larger tail gets the code range's longer side, [-centre, 0]
    signed = -reach / form.centre
    signed = torch.where(signed.abs() < tiny, torch.full_like(signed, tiny), signed)
    even = (torch.maximum(high, -low) / (top / 2)).clamp(min=tiny)
    return [(signed, centre), (even, centre)]


def _grids(weights: Tensor, importance: Tensor, form: CodesForm) -> tuple[Tensor, Tensor]:
    """Scales and zero points (N, blocks) of all blocks of (N, K) `weights`, some rows at a time."""
    cols = weights.shape[1]
    blocks = form.blocks(cols)
    short = blocks * form.block - cols
    weight = torch.nn.functional.pad(importance, (0, short)).reshape(blocks, form.block)
    parts = []
    for some in torch.split(weights, max(1, _GRID_ELEMENTS // (blocks * form.block))):
        shaped = torch.nn.functional.pad(some, (0, short)).reshape(len(some), blocks, form.block)
        parts.append(block_grid(shaped, weight, form))
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def gptq(weights: Tensor, spread: Feedback, forms: Sequence[CodesForm]) -> list[Rounded]:
    """Round (N, K) `weights` to the codes of each of `forms`, column by column in the order of `spread`."""
    weights = weights.float()
    grids = [_grids(weights, spread.hessian.diagonal(), form) for form in forms]
    scale, zero = (_by_column([pair[part] for pair in grids], forms, spread.order) for part in (0, 1))
    columns = weights[:, spread.order].T.repeat(1, len(forms))
    codes = _by_form(spread_errors(columns, scale, zero, _tops(weights, forms), spread.upper), forms, spread.order)
    return [
        Rounded(codes=code, scales=scales, zeros=zeros.to(torch.uint8) if form.zeros else None)
        for code, (scales, zeros), form in zip(codes, grids, forms, strict=True)
    ]


def descend(weights: Tensor, rounded: Sequence[Rounded], spread: Feedback, forms: Sequence[CodesForm]) -> list[Rounded]:
    """Set every code of (N, K) `weights`, as it is in each of `forms`, anew, in the order of `spread`, to the one that
    minimises (w - ŵ) H (w - ŵ)ᵀ with the scales and all other codes as they are. H is damped as for GPTQ."""
    hessian = spread.hessian[spread.order][:, spread.order]
    damping = _DAMPING * float(hessian.diagonal().mean())
    hessian.diagonal().add_(damping).clamp_(min=torch.finfo(torch.float32).tiny)
    scale = _by_column([one.scales for one in rounded], forms, spread.order)
    error = torch.cat(
        [(weights.float() - values(one, form))[:, spread.order].T for one, form in zip(rounded, forms, strict=True)],
        dim=1,
    )
    codes = torch.cat([one.codes[:, spread.order].T.float() for one in rounded], dim=1)
    fresh = _by_form(look_back(codes, error, scale, _tops(weights, forms), hessian), forms, spread.order)
    return [Rounded(codes=code, scales=one.scales, zeros=one.zeros) for code, one in zip(fresh, rounded, strict=True)]


def _by_column(parameters: Sequence[Tensor], forms: Sequence[CodesForm], order: Tensor) -> Tensor:
    """(K, N · forms): for every column in `order` and every row, its block's number among each form's (N, blocks)."""
    parts = [
        each.T[torch.div(order, form.block, rounding_mode="floor")]
        for each, form in zip(parameters, forms, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _by_form(codes: Tensor, forms: Sequence[CodesForm], order: Tensor) -> list[Tensor]:
    """Codes (K, N · forms) in `order` as one (N, K) uint8 for each form, columns in their places."""
    found = []
    for part in codes.chunk(len(forms), dim=1):
        placed = torch.empty(part.shape[1], part.shape[0], dtype=torch.uint8, device=codes.device)
        placed[:, order] = part.T.to(torch.uint8)
        found.append(placed)
    return found


def _tops(weights: Tensor, forms: Sequence[CodesForm]) -> Tensor:
    """(N · forms,) the largest code of each row."""
    return torch.tensor([2.0**form.bits - 1 for form in forms], device=weights.device).repeat_interleave(len(weights))


def values(rounded: Rounded, form: CodesForm) -> Tensor:
    """The (N, K) float32 matrix that the codes stand for."""
    scales = rounded.scales.repeat_interleave(form.block, dim=1)[:, : rounded.codes.shape[1]]
    return _centred(rounded, form) * scales


def packed(rounded: Rounded, form: CodesForm) -> dict[str, NDArray[np.generic]]:
    """The tensors that the codes are stored in."""
    zeros = None if rounded.zeros is None else rounded.zeros.cpu().numpy()
    return form.pack(rounded.codes.cpu().numpy(), rounded.scales.cpu().numpy(), zeros)


def activation_error(inputs: Tensor, block: int) -> Tensor:
    """What (T, K) `inputs` lose when the kernels round them to 8 bits, each block of each row by its largest
    magnitude."""
    short = -inputs.shape[1] % block
    shaped = torch.nn.functional.pad(inputs, (0, short)).reshape(len(inputs), -1, block)
    largest = shaped.abs().amax(dim=-1, keepdim=True)  # an infinity norm is the same and ten times slower
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    error: Tensor = (shaped / scale).round_().mul_(scale).sub_(shaped)
    return error.reshape(len(inputs), -1)[:, : inputs.shape[1]]


def activation_price(weights: Tensor, noise: Tensor, gradient: Tensor) -> float:
    """½ tr(G W N Wᵀ): what rounded inputs cost in nats per token, for their errors' variances N (K,) by channel.

    The same expansion as `price`, with a change of the inputs in the place of one of the weights. G (N, N) or its
    diagonal (N,).
    """
    response = weights * noise
    if gradient.dim() == 1:
        return 0.5 * float((response * weights).sum(1).double() @ gradient.double())
    return 0.5 * float(((gradient @ weights) * response).double().sum())


def _centred(rounded: Rounded, form: CodesForm) -> Tensor:
    cols = rounded.codes.shape[1]
    if rounded.zeros is None:
        return rounded.codes.float().sub(form.centre)
    return rounded.codes.float() - rounded.zeros.float().repeat_interleave(form.block, dim=1)[:, :cols]


def refit_scales(rounded: Rounded, target: Tensor, hessian: Tensor, form: CodesForm) -> Rounded:
    """Scales that minimise (w - ŵ) H (w - ŵ)ᵀ for each row with the codes as they are; `target` is W H (N, K)."""
    rows, cols = rounded.codes.shape
    blocks = form.blocks(cols)
    centred = _centred(rounded, form)
    padded = torch.nn.functional.pad(centred, (0, blocks * form.block - cols)).reshape(rows, blocks, form.block)
    gram = torch.nn.functional.pad(hessian, (0, blocks * form.block - cols, 0, blocks * form.block - cols))
    reached = torch.nn.functional.pad(target, (0, blocks * form.block - cols)).reshape(rows, blocks, form.block)
    right = (padded * reached).sum(-1)
    left = torch.empty(rows, blocks, blocks, device=target.device)
    shaped = gram.reshape(blocks, form.block, blocks, form.block)
    for block in range(blocks):
        reach = padded[:, block] @ shaped[block].reshape(form.block, -1)
        left[:, block] = (reach.reshape(rows, blocks, form.block) * padded).sum(-1)
    ridge = 1e-4 * left.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-30)
    left = left + torch.diag_embed(ridge[:, None].expand(rows, blocks))
    right = right + ridge[:, None] * rounded.scales
    solved, failed = torch.linalg.solve_ex(left, right[..., None])
    fresh = solved[..., 0]
    usable = (failed == 0)[:, None] & torch.isfinite(fresh) & (fresh.abs() > 0)
    return Rounded(codes=rounded.codes, scales=torch.where(usable, fresh, rounded.scales), zeros=rounded.zeros)


def price(error: Tensor, hessian: Tensor, gradient: Tensor) -> float:
    """½ tr(G E H Eᵀ): the rise of the loss in nats per token when the weights change by `error` (N, K).

    `gradient` is G (N, N), or its diagonal (N,). Kronecker-factored Gauss-Newton, Martens & Grosse 2015
    (arXiv 1503.05671), with E the change of weights.
    """
    response = error @ hessian
    if gradient.dim() == 1:
        return 0.5 * float((response * error).sum(1).double() @ gradient.double())
    return 0.5 * float(((gradient @ error) * response).double().sum())
