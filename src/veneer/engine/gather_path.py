"""A mixed batch over many adapters, on a GPU: each row with its own factors, rather than with all and a mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from veneer.engine.state import State
from veneer.ops.gather import Rows, gathered
from veneer.ops.kernels import kernel

FEW = 4
"""So many adapters' factors are multiplied with every row sooner than they are sorted out."""

Parts = tuple[tuple[str, int, float], ...]
"""(adapter, rank, scaling) of each, as their factors lie side by side."""


def own_rows(
    state: State, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, parts: Parts
) -> Tensor | None:
    """The layer with its rows' own branches; None where the product with all factors is to run.

    Args:
        state: whose route says which row is whose.
        x: (batch, ..., in).
        weight, bias: the layer's, in x's dtype.
        a: (total rank, in).
        b: (out, total rank).
        parts: what lies where in a and b.
    """
    if len(parts) <= FEW or state.route is None or kernel("gather", x, weight) is None:
        return None
    flat = x.reshape(-1, x.shape[-1])
    y = gathered(F.linear(flat, weight, bias), flat, a.to(x.dtype), b.to(x.dtype), _rows(state, x, parts))
    return y.view(*x.shape[:-1], -1)


def _rows(state: State, x: Tensor, parts: Parts) -> Rows:
    batch, inner = x.shape[0], x.shape[1:-1].numel()
    key = ("rows", batch, inner, parts, x.device)
    if key not in state.masks:
        assert state.route is not None
        names, ranks, scalings = zip(*parts, strict=True)
        times = state.times(batch, len(state.route)) * inner
        index = [names.index(name) if name in names else -1 for name in state.route for _ in range(times)]
        state.masks[key] = Rows.of(index, ranks, scalings, x.device)
    return state.masks[key]
