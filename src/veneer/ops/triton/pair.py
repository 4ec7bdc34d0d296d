"""The two gradients that a low-rank branch takes from that of its output, in one reading of it.

    dh = dY B        dB = dY^T h        dY (N, out) the large one, B (out, r), h (N, r)

A program owns some columns and a run of rows: its share of dB stays in registers, its share of dh is written aside and
added up afterwards, in a fixed order. That is r / COLS of what one reading of dY is: it pays for small r only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.kernels import apart, guarded
from veneer.ops.triton.common import block, dot, precision


@triton.jit
def _pair(dy, b, h, dh_parts, db_parts, n, out, rank, per, h_rank, h_row, ROWS: tl.constexpr, COLS: tl.constexpr,
          RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    part = tl.program_id(1)
    ranks = tl.arange(0, RANK)
    factor = tl.load(b + cols[:, None] * rank + ranks[None, :], (cols[:, None] < out) & (ranks[None, :] < rank), 0.0)
    db = tl.zeros((COLS, RANK), dtype=tl.float32)
    for start in range(part * per, min(part * per + per, n), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < n) & (ranks[None, :] < rank)
        grad = tl.load(
            dy + rows[:, None].to(tl.int64) * out + cols[None, :], (rows[:, None] < n) & (cols[None, :] < out), 0.0
        )
        own = tl.load(h + ranks[None, :] * h_rank + rows[:, None].to(tl.int64) * h_row, inside, 0.0)
        dh = dot(grad, factor, tl.zeros((ROWS, RANK), dtype=tl.float32), PRECISION)
        db = dot(tl.trans(grad), own, db, PRECISION)
        tl.store(dh_parts + (tl.program_id(0).to(tl.int64) * n + rows[:, None]) * rank + ranks[None, :], dh, inside)
    tl.store(
        db_parts + (part.to(tl.int64) * out + cols[:, None]) * rank + ranks[None, :], db,
        (cols[:, None] < out) & (ranks[None, :] < rank),
    )  # fmt: skip


@guarded
def pair(dy: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(dh (r, N), dB (out, r)), float32, for dY (N, out), B (out, r) and h (r, N), which may lie either way round."""
    dy, b = dy.contiguous(), b.contiguous()
    (n, out), rank = dy.shape, b.shape[1]
    ROWS, COLS = block(n, most=32), block(out)
    per = triton.cdiv(triton.cdiv(n, 16), ROWS) * ROWS
    columns, runs = triton.cdiv(out, COLS), triton.cdiv(n, per)
    dh = dy.new_empty(columns, n, rank, dtype=torch.float32)
    db = dy.new_empty(runs, out, rank, dtype=torch.float32)
    _pair[columns, runs](
        dy, b, h, dh, db, n, out, rank, per, h.stride(0), h.stride(1),
        ROWS=ROWS, COLS=COLS, RANK=block(rank), PRECISION=precision(),
    )  # fmt: skip
    return dh.sum(0).t(), db.sum(0)


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far both are from the two products."""
    dy, b, h = (torch.randn(s, device=device).to(dtype) for s in ((70, 150), (150, 20), (20, 70)))
    dh, db = pair(dy, b, h)
    return {"inner gradient": apart(dh, (dy @ b).t()), "factor's gradient": apart(db, (h @ dy).t())}
