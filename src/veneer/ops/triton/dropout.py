"""A low-rank branch under dropout without a mask in memory: one seed is kept, the mask is drawn anew (as in Philox).

    h = (m * x) A^T        dA = dh^T (m * x)        dx += m * (dh A)        m_ij = [byte_ij(seed) >= cut]

What is kept is not scaled up; callers fold 1 / share into the scaling. The eager twin is ``twin_mask`` and products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.kernels import apart, guarded
from veneer.ops.triton.common import block, dot, kept, precision


@triton.jit
def _inner(x, a, seed, h, n, width, rank, cut, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    key = tl.load(seed)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for first in range(0, width, COLS):
        cols = first + tl.arange(0, COLS)
        seen = tl.load(
            x + rows[:, None].to(tl.int64) * width + cols[None, :], (rows[:, None] < n) & (cols[None, :] < width), 0.0
        )
        seen = tl.where(kept(key, rows, first, width, cut, COLS, ROWS), seen, 0.0)
        factor = tl.load(
            a + ranks[None, :] * width + cols[:, None], (ranks[None, :] < rank) & (cols[:, None] < width), 0.0
        )
        total = dot(seen, factor, total, PRECISION)
    inside = (rows[:, None] < n) & (ranks[None, :] < rank)
    tl.store(h + rows[:, None].to(tl.int64) * rank + ranks[None, :], total.to(h.dtype.element_ty), inside)


@triton.jit
def _outer(x, dh, seed, parts, n, width, rank, cut, per, dh_rank, dh_row, ROWS: tl.constexpr, COLS: tl.constexpr,
           RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * COLS
    cols = first + tl.arange(0, COLS)
    ranks = tl.program_id(1) * RANK + tl.arange(0, RANK)
    part = tl.program_id(2)
    key = tl.load(seed)
    total = tl.zeros((RANK, COLS), dtype=tl.float32)
    for start in range(part * per, min(part * per + per, n), ROWS):
        rows = start + tl.arange(0, ROWS)
        seen = tl.load(
            x + rows[:, None].to(tl.int64) * width + cols[None, :], (rows[:, None] < n) & (cols[None, :] < width), 0.0
        )
        seen = tl.where(kept(key, rows, first, width, cut, COLS, ROWS), seen, 0.0)
        grad = tl.load(
            dh + ranks[:, None] * dh_rank + rows[None, :].to(tl.int64) * dh_row,
            (ranks[:, None] < rank) & (rows[None, :] < n), 0.0,
        )  # fmt: skip
        total = dot(grad, seen, total, PRECISION)
    inside = (ranks[:, None] < rank) & (cols[None, :] < width)
    tl.store(parts + (part * rank + ranks[:, None]).to(tl.int64) * width + cols[None, :], total, inside)


@triton.jit
def _spread(dx, dh, a, seed, n, width, rank, cut, dh_rank, dh_row, ROWS: tl.constexpr, COLS: tl.constexpr,
            RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    cols = first + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        ranks = start + tl.arange(0, RANK)
        grad = tl.load(
            dh + ranks[None, :] * dh_rank + rows[:, None].to(tl.int64) * dh_row,
            (rows[:, None] < n) & (ranks[None, :] < rank), 0.0,
        )  # fmt: skip
        factor = tl.load(
            a + ranks[:, None] * width + cols[None, :], (ranks[:, None] < rank) & (cols[None, :] < width), 0.0
        )
        total = dot(grad, factor, total, PRECISION)
    place = dx + rows[:, None].to(tl.int64) * width + cols[None, :]
    inside = (rows[:, None] < n) & (cols[None, :] < width)
    total = tl.where(kept(tl.load(seed), rows, first, width, cut, COLS, ROWS), total, 0.0)
    tl.store(place, (tl.load(place, inside, 0.0).to(tl.float32) + total).to(dx.dtype.element_ty), inside)


def draw(device: torch.device) -> Tensor:
    """A seed, from torch's own generator of the device: a checkpointed block that runs again draws it again."""
    return torch.randint(2**62, (1,), device=device)


@guarded
def inner(x: Tensor, a: Tensor, seed: Tensor, cut: int) -> Tensor:
    """``(m * x) A^T``: (N, r) for x (N, in) and a (r, in); in x's dtype."""
    x, a = x.contiguous(), a.contiguous()
    (n, width), rank = x.shape, len(a)
    h = x.new_empty(n, rank)
    ROWS, COLS, RANK = block(n, most=64), block(width, most=64), block(rank)
    grid = triton.cdiv(n, ROWS), triton.cdiv(rank, RANK)
    _inner[grid](x, a, seed, h, n, width, rank, cut, ROWS=ROWS, COLS=COLS, RANK=RANK, PRECISION=precision())
    return h


@guarded
def outer(x: Tensor, dh: Tensor, seed: Tensor, cut: int) -> Tensor:
    """``dh (m * x)``: (r, in) for dh (r, N), which may lie either way round; in x's dtype."""
    x = x.contiguous()
    (n, width), rank = x.shape, len(dh)
    ROWS, COLS, RANK = block(n, most=64), block(width, most=64), block(rank, most=64)
    per = triton.cdiv(triton.cdiv(n, 16), ROWS) * ROWS  # rows a program adds up; the sums are added in a fixed order
    split = triton.cdiv(n, per)
    parts = x.new_empty(split, rank, width, dtype=torch.float32)
    _outer[triton.cdiv(width, COLS), triton.cdiv(rank, RANK), split](
        x, dh, seed, parts, n, width, rank, cut, per, dh.stride(0), dh.stride(1),
        ROWS=ROWS, COLS=COLS, RANK=RANK, PRECISION=precision(),
    )  # fmt: skip
    return parts.sum(0).to(x.dtype)


@guarded
def spread(dx: Tensor, dh: Tensor, a: Tensor, seed: Tensor, cut: int) -> Tensor:
    """``dx += m * (dh^T A)`` in place: dx (N, in) contiguous, dh (r, N), a (r, in); returns dx."""
    a = a.contiguous()
    (n, width), rank = dx.shape, len(a)
    ROWS, COLS = block(n, most=64), block(width, most=64)
    _spread[triton.cdiv(n, ROWS), triton.cdiv(width, COLS)](
        dx, dh, a, seed, n, width, rank, cut, dh.stride(0), dh.stride(1),
        ROWS=ROWS, COLS=COLS, RANK=block(rank, most=64), PRECISION=precision(),
    )  # fmt: skip
    return dx


def mask(x: Tensor, seed: Tensor, cut: int) -> Tensor:
    """m itself (N, in), for x of that shape: 1 where an entry is kept."""
    return spread(torch.zeros_like(x), x.new_ones(1, len(x)), x.new_ones(1, x.shape[1]), seed, cut)


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far each of the three is from plain products with the mask, and the mask from its share."""
    n, width, rank, cut = 100, 72, 20, 64
    x, a, dh = (torch.randn(s, device=device).to(dtype) for s in ((n, width), (rank, width), (rank, n)))
    seed, dx = draw(device), torch.ones_like(x)
    m = mask(x, seed, cut)
    return {
        "share of kept entries": 0.0 if abs(float(m.float().mean()) - 0.75) < 0.03 else float("nan"),
        "product": apart(inner(x, a, seed, cut), (m * x) @ a.t()),
        "factor's gradient": apart(outer(x, dh, seed, cut), dh @ (m * x)),
        "input's gradient": apart(spread(dx.clone(), dh, a, seed, cut), dx + m * (dh.t() @ a)),
    }
