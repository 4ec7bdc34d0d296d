"""Starts of LoRA together with an NF4 base: LoftQ and QPiSSA, each by alternation.

    LoftQ  (Li et al., 2023, arXiv:2310.08659)     P = 0;          T times:  Q = q(W - P),  P = SVD_r(W - Q)
    QPiSSA (Meng et al., 2024, arXiv:2404.02948)   P = SVD_r(W);  T - 1 times the same;  then  Q = q(W - P)

with P = s B A, W (out, in), q the quantiser. LoftQ ends by fitting P, QPiSSA by fitting Q: its P keeps the few large
directions, whose absence lets Q use its levels better. Cost: T decompositions of rank r, once.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from veneer.methods.lora_init import balanced
from veneer.ops.factor import top_svd
from veneer.ops.nf4_bytes import Layout, packed, unpacked


def loftq(w: Tensor, r: int, s: float, rounds: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r), and the weight whose rounding is the base."""
    base = w
    a, b = balanced(top_svd(w - rounded(base, layout), r), s)
    for _ in range(max(1, rounds) - 1):
        base = w - s * (b @ a)
        a, b = balanced(top_svd(w - rounded(base, layout), r), s)
    return a, b, base


def qpissa(w: Tensor, r: int, s: float, rounds: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, in), B (out, r), and the weight whose rounding is the base."""
    a, b = balanced(top_svd(w, r), s)
    for _ in range(max(1, rounds) - 1):
        a, b = balanced(top_svd(w - rounded(w - s * (b @ a), layout), r), s)
    return a, b, w - s * (b @ a)


def rounded(w: Tensor, layout: Layout) -> Tensor:
    """``w`` (out, in) as NF4 stores it, float32."""
    return unpacked(packed(w, layout), layout, w.dtype)


Start = Callable[[Tensor, int, float, int, Layout], tuple[Tensor, Tensor, Tensor]]
STARTS: dict[str, Start] = {"loftq": loftq, "qpissa": qpissa}
