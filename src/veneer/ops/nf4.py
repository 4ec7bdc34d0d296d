"""NormalFloat quantisation in plain torch (Dettmers et al., 2023, QLoRA, arXiv:2305.14314): the reference form.

    w ~ c * code[k]        c = max |w| of a block of 64 values,  k = the nearest of 2^bits levels to w / c

The levels are equally likely under N(0, 1) scaled to [-1, 1], with an exact zero. Double quantisation stores the c of
256 blocks as 8-bit codes of c - mean(c): 4 + 8/64 + 32/(64 * 256) bits a weight.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK, OUTER_BLOCK = 64, 256


@functools.cache
def levels(bits: int = 4) -> Tensor:
    """The 2^bits levels, ascending, float32: Gaussian quantiles at even steps between o and 1/2 on either side of zero.

    The positive side has one level more. o = 1 - (1/32 + 1/30) / 2 puts half a step of mass beyond the last level.
    """
    o, half = 1 - (1 / 32 + 1 / 30) / 2, 2 ** (bits - 1)
    up = torch.special.ndtri(torch.linspace(o, 0.5, half + 1, dtype=torch.float64))[:-1]
    down = -torch.special.ndtri(torch.linspace(o, 0.5, half, dtype=torch.float64))[:-1]
    every = torch.cat([up, down, up.new_zeros(1)]).sort().values
    return (every / every.max()).float()


@functools.cache
def dynamic_levels() -> Tensor:
    """256 signed levels of the 8-bit dynamic code: seven decades, the larger the decade the finer its division."""
    decades = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    side = torch.cat(decades)
    return torch.cat([-side, side, torch.tensor([0.0, 1.0])]).sort().values.float()


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Index (uint8) of the entry of the ascending ``codes`` that is nearest to each of ``x``."""
    codes = codes.to(x.device, x.dtype)
    return torch.bucketize(x, (codes[:-1] + codes[1:]) / 2).to(torch.uint8)


@dataclass
class Quantised:
    """A quantised tensor: ``codes`` (uint8, one a value; ``packed`` holds two), one constant a block, and its shape.

    With double quantisation ``constants`` are uint8 codes, ``outer`` their float32 maxima a block of 256, and ``mean``
    what was subtracted before.
    """

    codes: Tensor
    constants: Tensor
    shape: tuple[int, ...]
    bits: int = 4
    block: int = BLOCK
    outer: Tensor | None = None
    mean: Tensor | None = None

    def packed(self) -> Tensor:
        """Two 4-bit codes a byte, the first one in the high half."""
        pairs = torch.nn.functional.pad(self.codes, (0, len(self.codes) % 2)).reshape(-1, 2)
        return pairs[:, 0] << 4 | pairs[:, 1]


def quantise(w: Tensor, bits: int = 4, block: int = BLOCK, double: bool = False) -> Quantised:
    """Quantise any float tensor; a last block that is not full stands for itself.

    Args:
        w: any shape.
        bits: 2 to 8.
        block: values that share a constant.
        double: quantise the constants as well.
    """
    codes, constants = _blockwise(w.detach().float().flatten(), levels(bits), block)
    out = Quantised(codes, constants, tuple(w.shape), bits, block)
    if double:
        out.mean = constants.mean()
        out.constants, out.outer = _blockwise(constants - out.mean, dynamic_levels(), OUTER_BLOCK)
    return out


def dequantise(q: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that ``q`` stands for, in ``q.shape``."""
    constants = q.constants
    if q.outer is not None:
        constants = _values(q.constants, q.outer, dynamic_levels(), OUTER_BLOCK) + q.mean
    return _values(q.codes, constants, levels(q.bits), q.block).reshape(q.shape).to(dtype)


def _blockwise(flat: Tensor, codes: Tensor, block: int) -> tuple[Tensor, Tensor]:
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    constants = padded.abs().amax(dim=1)
    scaled = padded / torch.where(constants == 0, 1, constants)[:, None]
    return nearest(scaled, codes).flatten()[: len(flat)], constants


def _values(codes: Tensor, constants: Tensor, table: Tensor, block: int) -> Tensor:
    each = constants.repeat_interleave(block)[: len(codes)]
    return table.to(codes.device)[codes.long()] * each


def rounded(w: Tensor, bits: int) -> Tensor:
    """``w`` on the grid of a ``bits``-bit quantiser, in float32: NormalFloat for 2 and 4, int8 a row for 8.

    Raises:
        ValueError: another number of bits.
    """
    if bits in (2, 4):
        return dequantise(quantise(w, bits))
    if bits != 8:
        raise ValueError(f"A base can be quantised to 2, 4 or 8 bits here, not {bits}.")
    return rounded_int(w, 8, math.prod(w.shape[1:]))


def rounded_int(w: Tensor, bits: int, block: int) -> Tensor:
    """``w`` on a symmetric integer grid of 2^bits - 1 levels, scaled by the largest of each block."""
    flat, top = w.detach().float().flatten(), 2 ** (bits - 1) - 1
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    c = padded.abs().amax(dim=1, keepdim=True) / top
    out = (padded / torch.where(c == 0, 1, c)).round() * c
    return out.flatten()[: len(flat)].reshape(w.shape)
