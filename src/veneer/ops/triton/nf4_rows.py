"""A few rows times an NF4 weight, whose bytes are read once and never unpacked in memory: decoding.

    y = x deq(bytes)^T + b        x (M, in), M <= 16

Every program makes the weights of some outputs, a tile at a time, from the bytes, constants and tables.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops import nf4, nf4_bytes
from veneer.ops.kernels import apart, guarded
from veneer.ops.nf4_bytes import Layout
from veneer.ops.triton.common import block, dot, precision
from veneer.ops.triton.nf4 import packed_at_random, parts, value


@triton.jit
def _product(y, x, bias, codes, wide, narrow, levels, dynamic, n, width, out, BIAS: tl.constexpr, BLOCK: tl.constexpr,
             OUTER: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, OUT: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, ROWS)
    outs = tl.program_id(0) * OUT + tl.arange(0, OUT)
    total = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for first in range(0, width, COLS):
        cols = first + tl.arange(0, COLS)
        seen = tl.load(x + rows[:, None] * width + cols[None, :], (rows[:, None] < n) & (cols[None, :] < width), 0.0)
        inside = (cols[:, None] < width) & (outs[None, :] < out)
        flat = outs[None, :].to(tl.int64) * width + cols[:, None]
        w = value(flat, inside, codes, wide, narrow, levels, dynamic, x.dtype.element_ty, BLOCK, OUTER, DOUBLE)
        total = dot(seen, w, total, PRECISION)
    if BIAS:
        total += tl.load(bias + outs, outs < out, 0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < n) & (outs[None, :] < out)
    tl.store(y + rows[:, None] * out + outs[None, :], total.to(y.dtype.element_ty), inside)


@guarded
def product(x: Tensor, data: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """``x`` (..., in) of 16 rows at most through the layer: (..., out)."""
    out, width = layout.shape
    flat = x.reshape(-1, width).contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    OUT = 16 if out <= 4096 else 32
    _product[(triton.cdiv(out, OUT),)](
        y, flat, flat if bias is None else bias, *parts(data, layout), len(flat), width, out, BIAS=bias is not None,
        BLOCK=layout.block, OUTER=nf4.OUTER_BLOCK, DOUBLE=layout.double,
        ROWS=16, COLS=block(width), OUT=OUT, PRECISION=precision(),
    )  # fmt: skip
    return y


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far outputs are from those over the weight that the eager twin unpacks."""
    found = {}
    for double in (True, False):
        data, layout = packed_at_random(device, (70, 129), double)
        x, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((3, 129), (70,)))
        twin = F.linear(x, nf4_bytes.unpacked_eager(data, layout, dtype), bias)
        found[f"output ({'double' if double else 'single'} quantisation)"] = apart(product(x, data, bias, layout), twin)
    return found
