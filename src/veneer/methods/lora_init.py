"""Starts of LoRA from the weight alone: PiSSA, OLoRA, MiLoRA, MiCA, orthogonal, LoftQ.

    PiSSA (Meng et al., 2024, arXiv:2404.02948)       B A s = the r leading singular triplets of W
    MiLoRA (Wang et al., 2024, arXiv:2406.09044)      B A s = the r trailing ones
    OLoRA (Buyukakyuz, 2024, arXiv:2406.01775)        B = Q[:, :r], A = R[:r],  W = Q R
    MiCA (2026, arXiv:2604.01694)                     B = the r trailing left singular vectors, frozen; A = 0
    orthogonal                                        B A = 0 with both factors away from zero
    LoftQ (Li et al., 2023, arXiv:2310.08659)         Q + s B A ~ W, Q on a quantiser's grid, by alternation

with W (out, in), A (r, in), B (out, r), s the adapter's scale. The first three leave W - s B A as the base while the
adapter is active (``lora_split``); LoftQ leaves Q. A convolution is seen as the matrix (out, in * kernel), a grouped
one or a stack of experts as several, an embedding as (dim, vocab). Cost: PiSSA some ten products of W with 16 columns,
OLoRA one with r; the trailing triplets need a full decomposition.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from veneer.core import quant
from veneer.methods.lora import Lora, LoraConfig, start
from veneer.methods.lora_options import LoftQConfig
from veneer.methods.lora_split import place, split
from veneer.ops import nf4
from veneer.ops.factor import SVD, bottom_svd, thin_qr, top_svd

Make = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@start("pissa")
def pissa(lora: Lora, config: LoraConfig) -> None:
    """``pissa_niter_N`` comes as near to the triplets as N power iterations do; the base takes up what is left."""
    steps = _steps(str(config.init_lora_weights))
    s = check_splits(lora, "pissa")
    split(lora, *each(lora, lambda w, r: balanced(top_svd(w, r, steps), s)))


@start("milora")
def milora(lora: Lora, config: LoraConfig) -> None:
    """The trailing triplets, which say least about what the weight has learnt; the leading ones stay in the base."""
    s = check_splits(lora, "milora")
    split(lora, *each(lora, lambda w, r: balanced(bottom_svd(w, r), s)))


@start("olora")
def olora(lora: Lora, config: LoraConfig) -> None:
    """The first r columns of Q and rows of R; as the peer has it, not divided by s."""
    check_splits(lora, "olora")

    def first_columns(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
        q, upper = thin_qr(w, r)
        return upper, q

    split(lora, *each(lora, first_columns))


@start("mica")
def mica(lora: Lora, config: LoraConfig) -> None:
    """B stays what it is, A starts at zero; the weight is left alone."""
    check_splits(lora, "mica", needs_float=False)
    place(lora, *each(lora, lambda w, r: (w.new_zeros(r, w.shape[1]), bottom_svd(w, r)[0])))
    lora.fixed = frozenset({lora.factor_names[1]})


@start("orthogonal")
def orthogonal(lora: Lora, config: LoraConfig) -> None:
    """A from the odd and B from the even rows of one orthogonal matrix, each mixed at random."""
    if lora.matrices()[0].shape[-2] % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal' needs an even rank for each matrix, but '{lora.site.path}' has "
            f"{lora.matrices()[0].shape[-2]}; set another r or rank_pattern."
        )

    def halves(w: Tensor, r: int) -> tuple[Tensor, Tensor]:
        q, _ = torch.linalg.qr(torch.randn(r, r))
        a = q[1::2].T @ torch.randn(r // 2, w.shape[1]) / 10
        b = torch.randn(w.shape[0], r // 2) @ q[::2] / 10
        return a, b

    place(lora, *each(lora, halves))


@start("loftq")
def loftq(lora: Lora, config: LoraConfig) -> None:
    """The base becomes Q for as long as the adapter is active; the start is near the base, not equal to it."""
    s, how = check_splits(lora, "loftq"), config.loftq_config
    how = how if isinstance(how, LoftQConfig) else LoftQConfig()
    w = base_matrices(lora)
    a, b, q = alternate(w, lora, s, how.loftq_bits, how.loftq_iter)
    place(lora, a, b)
    lora.rebase(q.reshape(lora.site.shape))


def alternate(w: Tensor, lora: Lora, s: float, bits: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ's Q and factors for ``w`` (..., out, in): Q = q(W - s B A), then s B A = the best of rank r for W - Q."""
    delta = torch.zeros_like(w)
    for _ in range(max(1, rounds)):
        q = nf4.rounded(w - delta, bits)
        a, b = each(lora, lambda m, r: balanced(top_svd(m, r), s), w - q)
        delta = s * (b @ a)
    return a, b, q


def balanced(triplets: SVD, s: float) -> tuple[Tensor, Tensor]:
    """A = sqrt(S / s) V^T and B = U sqrt(S / s), so that s B A = U S V^T."""
    u, values, v = triplets
    root = (values / s).sqrt()
    return root[:, None] * v.T, u * root


def each(lora: Lora, make: Make, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``make(W, r) -> (A, B)`` over the separate matrices of a layer, in the form of ``Lora.matrices``."""
    w = base_matrices(lora) if w is None else w
    r = lora.matrices()[0].shape[-2]
    if w.dim() == 2:
        return make(w, r)
    a, b = zip(*(make(m, r) for m in w), strict=True)
    return torch.stack(a), torch.stack(b)


def base_matrices(lora: Lora, w: Tensor | None = None) -> Tensor:
    """The base weight, or another tensor of its shape, as (..., out, in), float32."""
    a, b = lora.matrices()
    w = lora.site.weight.detach() if w is None else w
    return w.to(torch.promote_types(w.dtype, torch.float32)).reshape(*b.shape[:-1], a.shape[-1])


def _steps(name: str) -> int | None:
    """How far to grow the Krylov space, in steps of two products with the weight, as a power iteration has them."""
    _, marked, count = name.partition("_niter_")
    if marked and not (count.isdigit() and int(count)):
        raise ValueError(f"init_lora_weights='{name}' must end in a positive number of steps, as in pissa_niter_4.")
    return int(count) // 2 + 3 if marked else None  # a Krylov space forgets none of its steps, so fewer will do


def check_splits(lora: Lora, name: str, times: int = 1, needs_float: bool = True) -> float:
    """s, after refusing a layer whose weight the start ``name``, which takes ``times`` r directions, cannot split.

    Raises:
        ValueError: a rank above the layer's dimensions, a packed weight, or a scale that is not positive.
    """
    _check_rank(lora, name, times)
    site = lora.site
    if needs_float and (quant.backend(site.module) is not None or not site.stored.is_floating_point()):
        raise ValueError(
            f"init_lora_weights='{name}' splits the weight of '{site.path}', which must be float for that but is "
            f"stored as {site.stored.dtype}; load the base unquantised, or choose another start."
        )
    if lora.scaling <= 0:
        raise ValueError(f"init_lora_weights='{name}' needs a positive lora_alpha, not {lora.lora_alpha}.")
    return lora.scaling


def _check_rank(lora: Lora, name: str, times: int) -> None:
    a, b = lora.matrices()
    r, most = times * a.shape[-2], min(a.shape[-1], b.shape[-2])
    if r > most:
        raise ValueError(
            f"init_lora_weights='{name}' asks for {r} directions at '{lora.site.path}', whose matrix of "
            f"{b.shape[-2]} x {a.shape[-1]} has only {most}; lower r with rank_pattern or exclude the layer."
        )
