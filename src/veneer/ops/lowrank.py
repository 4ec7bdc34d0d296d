"""The low-rank branch of a linear layer, ``s (drop(x) A^T) B^T``, eager and fused."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def lowrank(
    x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """``scaling * (drop(x) a^T) b^T (+ scaling * bias)``.

    Args:
        x: (..., in).
        a: (r, in).
        b: (out, r).
        scaling: the factor s.
        dropout: probability of dropping an entry of x; 0 outside training.
        bias: (out,) or None.

    Returns:
        (..., out), in the dtype of ``a``.
    """
    if dropout:
        x = F.dropout(x, dropout)
    y = F.linear(F.linear(x, a), b, bias)
    return y if scaling == 1 else y * scaling
