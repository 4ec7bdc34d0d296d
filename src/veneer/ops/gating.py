"""Gates over experts: top-k softmax, the load-balance term, and a gated sum of low-rank branches."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension in float32, kept at its k largest entries and renormalised over those.

    Args:
        logits: (..., experts).
        k: number of experts kept; at most ``experts``.

    Returns:
        gates (..., experts), float32, k of them non-zero, summing to 1; and the full probabilities (..., experts).
    """
    p = logits.float().softmax(-1)
    if k >= p.shape[-1]:
        return p, p
    values, chosen = p.topk(k, dim=-1)
    values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(-1, chosen, values), p


def load_balance(gates: Tensor, p: Tensor, mask: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e: f the share of (token, slot) assignments, P the mean probability; 1 where both are uniform.

    Args:
        gates: (tokens, experts), non-zero where a token uses an expert.
        p: (tokens, experts), the router's probabilities.
        mask: (tokens,), 0 for padding; None counts every token.
    """
    used = (gates > 0).to(p.dtype)
    if mask is not None:
        used, p = used * mask.to(p.dtype)[:, None], p * mask.to(p.dtype)[:, None]
    tokens = p.shape[0] if mask is None else mask.sum().clamp(min=1)
    f = used.sum(0) / used.sum().clamp(min=1)
    return p.shape[-1] * (f * (p.sum(0) / tokens)).sum()


def gated_lowrank(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """sum_e gates_e (x A_e^T) B_e^T as two matrix products over the stacked rank.

    Cost per token: 2 E r (in + out) FLOPs, in products as wide as E r; for the small ranks of adapters that is quicker
    than sorting tokens by expert.

    Args:
        x: (..., in).
        a: (experts, r, in).
        b: (experts, out, r).
        gates: (..., experts).

    Returns:
        (..., out).
    """
    experts, r, _ = a.shape
    h = (x @ a.flatten(0, 1).T).unflatten(-1, (experts, r)) * gates.to(x.dtype).unsqueeze(-1)
    return h.flatten(-2) @ b.transpose(1, 2).flatten(0, 1)


def gated_lowrank_naive(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """``gated_lowrank`` expert by expert: the twin that the tests compare with."""
    return sum(gates[..., e : e + 1].to(x.dtype) * (x @ a[e].T) @ b[e].T for e in range(a.shape[0]))  # type: ignore[return-value]
