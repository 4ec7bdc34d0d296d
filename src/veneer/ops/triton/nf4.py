"""NF4 bytes to the dense weight, in one kernel: see ``ops.nf4_bytes``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops import nf4, nf4_bytes
from veneer.ops.kernels import apart, guarded
from veneer.ops.nf4_bytes import Layout


@triton.jit
def value(flat, inside, codes, wide, narrow, levels, dynamic, dtype: tl.constexpr, BLOCK: tl.constexpr,
          OUTER: tl.constexpr, DOUBLE: tl.constexpr):  # fmt: skip
    """The weights at these places of the flattened matrix, float32, rounded in ``dtype`` as the eager twin rounds."""
    byte = tl.load(codes + flat // 2, inside, 0).to(tl.int32)
    level = tl.load(levels + tl.where(flat % 2 == 0, byte >> 4, byte & 15))
    place = flat // BLOCK
    if DOUBLE:
        of_outer = tl.load(wide + 1 + place // OUTER, inside, 0.0)
        constant = tl.load(dynamic + tl.load(narrow + place, inside, 0).to(tl.int32)) * of_outer + tl.load(wide)
    else:
        constant = tl.load(wide + place, inside, 0.0)
    return (level.to(dtype).to(tl.float32) * constant.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _unpack(out, codes, wide, narrow, levels, dynamic, count, BLOCK: tl.constexpr, OUTER: tl.constexpr,
            DOUBLE: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = flat < count
    w = value(flat, inside, codes, wide, narrow, levels, dynamic, out.dtype.element_ty, BLOCK, OUTER, DOUBLE)
    tl.store(out + flat, w, inside)


class Parts(NamedTuple):
    """The bytes' parts, and the tables, as ``value`` takes them."""

    codes: Tensor
    wide: Tensor
    narrow: Tensor
    levels: Tensor
    dynamic: Tensor


def parts(data: Tensor, layout: Layout) -> Parts:
    """Views of the bytes; nothing is copied but, once a device, the tables."""
    wide, narrow, codes = data.flatten().split(layout.parts)
    tables = (nf4_bytes.on(t, data.device, torch.float32) for t in (nf4_bytes.LEVELS, nf4_bytes.DYNAMIC))
    return Parts(codes, wide.view(torch.float32), narrow if layout.double else codes, *tables)


@guarded
def unpacked(data: Tensor, layout: Layout, dtype: torch.dtype, size: int = 1024) -> Tensor:
    """The dense weight (out, in) that the bytes stand for."""
    out = torch.empty(layout.shape, dtype=dtype, device=data.device)
    _unpack[(triton.cdiv(layout.values, size),)](
        out, *parts(data, layout), layout.values,
        BLOCK=layout.block, OUTER=nf4.OUTER_BLOCK, DOUBLE=layout.double, SIZE=size,
    )  # fmt: skip
    return out


def packed_at_random(
    device: torch.device, shape: tuple[int, int], double: bool, block: int = 64
) -> tuple[Tensor, Layout]:
    """Bytes to try a kernel on."""
    layout = Layout(shape, block, double)
    return nf4_bytes.packed(torch.randn(shape, device=device), layout), layout


def check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far weights are from those that the eager twin unpacks, with and without double quantisation."""
    found = {}
    for double in (True, False):
        data, layout = packed_at_random(device, (150, 129), double)
        twin = nf4_bytes.unpacked_eager(data, layout, dtype)
        found[f"weight ({'double' if double else 'single'} quantisation)"] = apart(unpacked(data, layout, dtype), twin)
    return found
