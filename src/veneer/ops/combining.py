"""Arithmetic of deltas: low-rank sums without the full matrix; the element-wise rules TIES, DARE, magnitude pruning.

TIES: Yadav et al., 2023, arXiv:2306.01708. DARE: Yu et al., 2023, arXiv:2311.03099. A delta is a matrix (..., m, n), or
a pair ``up (..., m, r)``, ``down (..., r, n)`` whose product it is; leading dimensions count groups or experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.ops.factor import gram_svd, top_svd

Pair = tuple[Tensor, Tensor]
NOISE = 1e-6
"""Singular values below this share of the largest are rounding."""


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The sum of ``w_i up_i down_i`` as one pair whose rank is the sum of theirs."""
    up = torch.cat([up for up, _ in pairs], dim=-1)
    return up, torch.cat([w * down for w, (_, down) in zip(weights, pairs, strict=True)], dim=-2)


def compressed(pair: Pair, rank: int | float) -> tuple[Pair, float]:
    """The best pair of this rank: a QR of each factor and an SVD of the small core; never the full matrix.

    Args:
        pair: up (..., m, r), down (..., r, n).
        rank: how many singular triplets to keep (filled up with zeros where there are fewer), or a share of the energy
            sum S^2 in (0, 1] that they must hold.

    Returns:
        The pair ``U S``, ``V^T``, and the relative error it makes.
    """
    up, down = pair
    q, upper = torch.linalg.qr(up)
    p, lower = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    keep = rank if isinstance(rank, int) else rank_for(s, rank)
    u, vh = q @ u, vh @ p.mT
    return _padded(u[..., :keep] * s[..., None, :keep], vh[..., :keep, :], keep), _lost(s[..., keep:], s)


def factored(matrix: Tensor, rank: int | float | None = None) -> tuple[Pair, float]:
    """A pair for a matrix (..., m, n) that has no factors: the best of ``rank``, or with None one that is exact."""
    m, n = matrix.shape[-2:]
    flat = matrix.reshape(-1, m, n)
    if isinstance(rank, int):
        found = [top_svd(w, min(rank, m, n)) for w in flat]
        keep = rank
    else:
        found = [gram_svd(w, min(m, n)) for w in flat]
        values = torch.stack([s for _, s, _ in found])
        keep = exact_rank(values) if rank is None else rank_for(values, rank)
    pairs = [_padded(u[:, :keep] * s[:keep], v[:, :keep].T, keep) for u, s, v in found]
    up, down = (torch.stack(each).reshape(*matrix.shape[:-2], *each[0].shape) for each in zip(*pairs, strict=True))
    size = matrix.norm()
    return (up, down), float((matrix - up @ down).norm() / size) if size else 0.0


def exact_rank(s: Tensor) -> int:
    """How many singular values (..., k) are more than rounding; at least 1."""
    return max(1, int((s > NOISE * s[..., :1]).sum(-1).max()))


def rank_for(s: Tensor, share: float) -> int:
    """The least rank that holds this share of the energy sum S^2 in every matrix; at least 1."""
    energy = s.double().square()
    reached = energy.cumsum(-1) >= share * energy.sum(-1, keepdim=True) * (1 - 1e-12)
    return max(1, int((s.shape[-1] + 1 - reached.sum(-1)).max())) if energy.any() else 1


def _padded(up: Tensor, down: Tensor, rank: int) -> Pair:
    missing = rank - up.shape[-1]
    if missing <= 0:
        return up, down
    return torch.nn.functional.pad(up, (0, missing)), torch.nn.functional.pad(down, (0, 0, 0, missing))


def _lost(rest: Tensor, s: Tensor) -> float:
    whole = s.square().sum()
    return float((rest.square().sum() / whole).sqrt()) if whole else 0.0


def clamped(pair: Pair, quantile: float) -> Pair:
    """Entries of both factors limited to plus or minus the ``quantile`` of all of them."""
    entries = torch.cat([pair[0].flatten(), pair[1].flatten()])
    high = entries.sort().values[min(len(entries) - 1, int(quantile * (len(entries) - 1)))].abs()
    return pair[0].clamp(-high, high), pair[1].clamp(-high, high)


# ---- element by element ---------------------------------------------------------------------------------------------
def largest(t: Tensor, density: float) -> Tensor:
    """The ``int(density * numel)`` entries of largest magnitude, the others zero."""
    keep = int(density * t.numel())
    if keep >= t.numel():
        return t
    mask = torch.zeros(t.numel(), device=t.device, dtype=torch.bool)
    mask[t.abs().flatten().topk(keep).indices] = True
    return t * mask.view_as(t)


def dropped(t: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability ``density`` and divided by it (DARE); drawn on the CPU, so alike everywhere."""
    mask = torch.rand(t.shape, generator=generator) < density
    return t * mask.to(t.device) / density


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i t_i``."""
    return torch.stack([w * t for w, t in zip(weights, tensors, strict=True)]).sum(0)


def elected(tensors: Sequence[Tensor], weights: Sequence[float], by: str) -> Tensor:
    """Per entry, the weighted mean of those whose sign wins: that of the sum ("total") or of most ("frequency").

    A zero has no say; weights multiply entries, and the mean is over how many agree.
    """
    t = torch.stack(list(tensors))
    ballot = t if by == "total" else t.sign()
    sign = torch.where(ballot.sum(0) >= 0, 1.0, -1.0)
    agree = t.sign() == sign
    scaled = t * torch.tensor(list(weights), dtype=t.dtype, device=t.device).view(-1, *[1] * (t.dim() - 1))
    return (scaled * agree).sum(0) / agree.sum(0).clamp_min(1)
