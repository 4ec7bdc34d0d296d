"""What the kernels share: the random mask, sizes of blocks, precision of products."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def kept(seed, rows, first, width, cut, COLS: tl.constexpr, ROWS: tl.constexpr):
    """Which entries of these rows, from column ``first`` on, dropout keeps: (ROWS, COLS).

    One random byte an entry, sixteen of them from one Philox counter, which is the entry's place in the whole matrix:
    so every kernel sees the same mask, whatever its blocks. ``first`` and COLS are multiples of 16.
    """
    counter = rows[:, None] * tl.cdiv(width, 16) + (first // 16 + tl.arange(0, COLS // 16))[None, :]
    a, b, c, d = tl.randint4x(seed, counter)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (ROWS, COLS // 4))
    drawn = (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]) & 255
    return tl.reshape(drawn, (ROWS, COLS)) >= cut


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b``, a and b in a's dtype, total in float32."""
    b = b.to(a.dtype)
    if INTERPRETED:  # numpy, which then computes it, knows no bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


def block(size: int, least: int = 16, most: int = 128) -> int:
    """A power of two that covers ``size``, within what a matrix product on the device wants."""
    return max(least, min(most, triton.next_power_of_2(size)))


def precision() -> str:
    """How float32 products are taken, as torch is told to."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
