"""An NF4 matrix as one run of bytes, and the product with it that keeps no dense weight (QLoRA, arXiv:2305.14314).

    y = x deq(bytes)^T + b        dx = dy deq(bytes)        W is frozen, so there is no dW and x is not kept

The run holds, in this order: mean and outer constants (float32) with the uint8 codes of the block constants, or without
double quantisation the block constants (float32); then two codes a byte. Being integers as a whole, it goes through
``.to(dtype)``, files and shards unchanged. Unpacking costs 3 in out operations a product, forward and backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import nf4
from veneer.ops.kernels import kernel


class Layout(NamedTuple):
    """What the bytes do not say: the weight's shape (out, in) and how it was quantised."""

    shape: tuple[int, int]
    block: int = nf4.BLOCK
    double: bool = True

    @property
    def values(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.values // self.block)

    @property
    def outer_blocks(self) -> int:
        return -(-self.blocks // nf4.OUTER_BLOCK)

    @property
    def parts(self) -> tuple[int, int, int]:
        """Bytes of the float32 constants, of the 8-bit constants, and of the codes."""
        if self.double:
            return 4 * (1 + self.outer_blocks), self.blocks, -(-self.values // 2)
        return 4 * self.blocks, 0, -(-self.values // 2)


def packed(weight: Tensor, layout: Layout) -> Tensor:
    """``weight`` (out, in) quantised: uint8 (bytes, 1)."""
    q = nf4.quantise(weight, 4, layout.block, layout.double)
    if q.outer is None:
        parts = [q.constants.view(torch.uint8)]
    else:
        mean = q.mean.reshape(1)  # type: ignore[union-attr]
        parts = [torch.cat([mean, q.outer]).view(torch.uint8), q.constants]
    return torch.cat([*parts, q.packed()])[:, None]


def unpacked(data: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The dense weight (out, in) that the bytes stand for."""
    found = kernel("nf4", data, dtype=dtype)
    return unpacked_eager(data, layout, dtype) if found is None else found.unpacked(data, layout, dtype)


def unpacked_eager(data: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The eager twin."""
    wide, narrow, codes = data.flatten().split(layout.parts)
    constants = wide.view(torch.float32)
    if layout.double:
        mean, outer = constants[0], constants[1:]
        table = on(DYNAMIC, data.device, torch.float32)
        constants = table[narrow.int()] * outer.repeat_interleave(nf4.OUTER_BLOCK)[: layout.blocks] + mean
    pairs = F.embedding(codes.int(), on(PAIRS, data.device, dtype)).flatten()  # (values), and one more if odd
    constants = constants.to(dtype)
    whole = layout.values // layout.block * layout.block
    dense = pairs[:whole].view(-1, layout.block) * constants[: whole // layout.block, None]
    if whole < layout.values:
        dense = torch.cat([dense.flatten(), pairs[whole : layout.values] * constants[-1]])
    return dense.view(layout.shape)


def on(table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One of the tables below, where it is needed."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return table.to(device, dtype)
    key = id(table), device, dtype
    if key not in _COPIES:  # once a device: a copy from the host would have each product wait for it
        copied = table.to(device, dtype)
        if type(copied) is not Tensor:
            return copied  # a stand-in without values, as tracers use them
        _COPIES[key] = copied
    return _COPIES[key]


_COPIES: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
with torch.device("cpu"):  # made here, once, so that no tracer and no device context sees them made
    LEVELS, DYNAMIC = nf4.levels(), nf4.dynamic_levels()
    _BYTE = torch.arange(256)
    PAIRS = torch.stack([LEVELS[_BYTE >> 4], LEVELS[_BYTE & 15]], dim=1)
"""(256, 2): the two values of each byte."""


class _Product(torch.autograd.Function):
    """``x W^T + b`` with the bytes of W, unpacked anew in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, data: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
        found = kernel("nf4_rows", x, data) if x.numel() <= 16 * x.shape[-1] else None
        if found is not None:
            return found.product(x, data, bias, layout)
        return F.linear(x, unpacked(data, layout, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, data, _, ctx.layout = inputs
        ctx.save_for_backward(data)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:  # type: ignore[override]
        (data,) = ctx.saved_tensors
        dx = dy @ unpacked(data, ctx.layout, dy.dtype) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db, None


def product(x: Tensor, data: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    """``x`` (..., in) through the layer: (..., out)."""
    return _Product.apply(x, data, bias, layout)
