"""Each row's own low-rank branch, and its gradients: see ``ops.gather``.

    h = s A x      y += B h      dh = s B^T dy      dx = A^T dh      dA_i = sum_n dh x^T      dB_i = sum_n dy h^T

For a run of rows in turn, every adapter among them is multiplied with all of them, and what is not its own is left out:
so its factors are read once a run, whether all rows of the run are its tokens or each is another's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.gather import Rows, gathered_eager
from veneer.ops.kernels import apart, guarded
from veneer.ops.triton.common import block, dot, precision


@triton.jit
def _shrink(x, f, index, starts, scalings, parts, n, width, per, f_rank, f_col, ROWS: tl.constexpr,
            COLS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    owner = tl.load(index + rows, rows < n, -1)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for i in range(tl.maximum(tl.min(tl.where(owner < 0, 2147483647, owner)), 0), tl.max(owner) + 1):
        if tl.sum((owner == i).to(tl.int32)) > 0:
            start = tl.load(starts + i)
            rank = tl.load(starts + i + 1) - start
            own = tl.zeros((ROWS, RANK), dtype=tl.float32)
            for first in range(part * per, min(part * per + per, width), COLS):
                cols = first + tl.arange(0, COLS)
                seen = tl.load(
                    x + rows[:, None].to(tl.int64) * width + cols[None, :],
                    (owner[:, None] == i) & (cols[None, :] < width), 0.0,
                )  # fmt: skip
                factor = tl.load(
                    f + (start + ranks[None, :]).to(tl.int64) * f_rank + cols[:, None].to(tl.int64) * f_col,
                    (ranks[None, :] < rank) & (cols[:, None] < width), 0.0,
                )  # fmt: skip
                own = dot(seen, factor, own, PRECISION)
            total += own * tl.load(scalings + i)
    tl.store(parts + (part.to(tl.int64) * n + rows[:, None]) * RANK + ranks[None, :], total, rows[:, None] < n)


@triton.jit
def _expand(y, h, f, index, starts, n, width, f_rank, f_col, ROWS: tl.constexpr, COLS: tl.constexpr,
            RANK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    owner = tl.load(index + rows, rows < n, -1)
    ranks = tl.arange(0, RANK)
    inner = tl.load(h + rows[:, None].to(tl.int64) * RANK + ranks[None, :], rows[:, None] < n, 0.0)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for i in range(tl.maximum(tl.min(tl.where(owner < 0, 2147483647, owner)), 0), tl.max(owner) + 1):
        if tl.sum((owner == i).to(tl.int32)) > 0:
            start = tl.load(starts + i)
            rank = tl.load(starts + i + 1) - start
            factor = tl.load(
                f + (start + ranks[:, None]).to(tl.int64) * f_rank + cols[None, :].to(tl.int64) * f_col,
                (ranks[:, None] < rank) & (cols[None, :] < width), 0.0,
            )  # fmt: skip
            own = tl.where(owner[:, None] == i, inner, 0.0)
            total = dot(own, factor, total, PRECISION)
    place = y + rows[:, None].to(tl.int64) * width + cols[None, :]
    inside = (rows[:, None] < n) & (cols[None, :] < width)
    tl.store(place, (tl.load(place, inside, 0.0).to(tl.float32) + total).to(y.dtype.element_ty), inside)


@triton.jit
def _outer(h, x, index, starts, out, n, width, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    i = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((RANK, COLS), dtype=tl.float32)
    for first in range(0, n, ROWS):
        rows = first + tl.arange(0, ROWS)
        owner = tl.load(index + rows, rows < n, -1)
        if tl.sum((owner == i).to(tl.int32)) > 0:
            seen = tl.load(
                x + rows[:, None].to(tl.int64) * width + cols[None, :],
                (owner[:, None] == i) & (cols[None, :] < width), 0.0,
            )  # fmt: skip
            inner = tl.load(h + rows[None, :].to(tl.int64) * RANK + ranks[:, None], owner[None, :] == i, 0.0)
            total = dot(inner, seen, total, PRECISION)
    start = tl.load(starts + i)
    inside = (ranks[:, None] < tl.load(starts + i + 1) - start) & (cols[None, :] < width)
    tl.store(out + (start + ranks[:, None]).to(tl.int64) * width + cols[None, :], total, inside)


@guarded
def shrink(x: Tensor, f: Tensor, rows: Rows) -> Tensor:
    """``s_i f_i x_n``: (N, largest rank as a power of two), for f (total rank, width) with any strides."""
    x = x.contiguous()
    n, width = x.shape
    ROWS, COLS, RANK = block(n, most=16 if n <= 256 else 64), block(width, most=64), block(rows.most)
    split = 1 if n > 256 else min(16, triton.cdiv(width, 256))  # few rows: more programs, each on some of the columns
    per = triton.cdiv(triton.cdiv(width, split), COLS) * COLS
    parts = x.new_empty(triton.cdiv(width, per), n, RANK, dtype=torch.float32)
    _shrink[triton.cdiv(n, ROWS), len(parts)](
        x, f, rows.index, rows.starts, rows.scalings, parts, n, width, per, f.stride(0), f.stride(1),
        ROWS=ROWS, COLS=COLS, RANK=RANK, PRECISION=precision(),
    )  # fmt: skip
    return parts.sum(0).to(x.dtype)


@guarded
def expand(y: Tensor, h: Tensor, f: Tensor, rows: Rows) -> Tensor:
    """``y_n += f_i^T h_n`` in place: y (N, width) contiguous, h as from ``shrink``."""
    n, width = y.shape
    ROWS, COLS = block(n, most=16 if n <= 256 else 64), block(width, most=64)
    _expand[triton.cdiv(n, ROWS), triton.cdiv(width, COLS)](
        y, h, f, rows.index, rows.starts, n, width, f.stride(0), f.stride(1),
        ROWS=ROWS, COLS=COLS, RANK=h.shape[1], PRECISION=precision(),
    )  # fmt: skip
    return y


@guarded
def outer(h: Tensor, x: Tensor, rows: Rows, total: int) -> Tensor:
    """``sum_n h_n x_n^T`` over each adapter's rows: (total rank, width)."""
    x = x.contiguous()
    n, width = x.shape
    out = x.new_empty(total, width)
    ROWS, COLS = block(n, most=64), block(width, most=64)
    _outer[len(rows.scalings), triton.cdiv(width, COLS)](
        h, x, rows.index, rows.starts, out, n, width, ROWS=ROWS, COLS=COLS, RANK=h.shape[1], PRECISION=precision()
    )
    return out


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Rows) -> Tensor:
        h = shrink(x, a, rows)
        ctx.rows = rows
        ctx.save_for_backward(x, a, b, h)
        ctx.mark_dirty(y)
        return expand(y, h, b.t(), rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h = ctx.saved_tensors
        _, of_x, of_a, of_b, _ = ctx.needs_input_grad
        dh = shrink(dy, b.t(), ctx.rows) if of_x or of_a else None
        dx = expand(torch.zeros_like(x, memory_format=torch.contiguous_format), dh, a, ctx.rows) if of_x else None
        da = outer(dh, x, ctx.rows, len(a)) if of_a else None
        db = outer(h, dy, ctx.rows, len(a)).t() if of_b else None
        return dy, dx, da, db, None


def gathered(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """As ``ops.gather.gathered``, in place."""
    return _Gathered.apply(y, x, a, b, rows)


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far the output and the gradients are from the eager twin's."""
    ranks = (4, 20, 8)
    rows = Rows.of([2, 2, -1, 0, 1, 1, 0] * 3, ranks, (0.5, 1.0, 2.0), device)
    n, inside, out, total = len(rows.index), 100, 70, sum(ranks)
    shapes = (n, out), (n, inside), (total, inside), (out, total)
    found = []
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    for run in (gathered, gathered_eager):
        y, x, a, b = (t.clone().requires_grad_() for t in tensors)
        with torch.enable_grad():
            answer = run(y * 1, x, a, b, rows)
            found.append([answer, *torch.autograd.grad(answer, (x, a, b), tensors[0])])
    names = ("output", "input's gradient", "gradient of A", "gradient of B")
    return {name: apart(ours, twin) for name, ours, twin in zip(names, *found)}
