"""Starts of LoRA that move a part of the weight into A and B, and the adapter of the original base they amount to.

    W_res = W - s B0 A0        so  W_res + s B A = W + s [B, -B0] [A; A0]

A0, B0 are kept beside A and B, as they are stored (rounded to their dtype), so the start equals the base whatever the
error of the factorisation, and a saved adapter is a plain LoRA of rank 2r for the original base, with everything else
of it as it was. Its scale stays s: alpha doubles, or for rsLoRA grows by sqrt(2).
"""

from __future__ import annotations

import copy
import math
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.cache import Seen

if TYPE_CHECKING:
    from veneer.methods.lora import Lora

SPLITTING = frozenset({"pissa", "olora", "milora", "corda", "lora_ga"})
"""The starts that end in ``split``."""


UNFIT = {
    "use_bdlora": (None, "keeps its factors as blocks"),
    "use_qalora": (None, "keeps an A of groups of inputs"),
    "alora_invocation_tokens": (SPLITTING | {"loftq"}, "acts on some tokens only, where a moved base acts on all"),
    "monteclora_config": (SPLITTING, "samples as many directions as its rank, which saving would double"),
}
"""Option -> the starts that do not go with it (None: any that writes to the factors), and why."""


def refuse_unfit(config: Any, family: str) -> None:
    """Refuse a start that an option of the config cannot hold.

    Raises:
        ValueError: names both.
    """
    for option, (unfit, why) in UNFIT.items():
        if getattr(config, option, None) and (unfit is None or family in unfit):
            raise ValueError(
                f"init_lora_weights='{family}' does not go with {option}, which {why}; leave one of them out."
            )


def splits(init: Any) -> bool:
    """Whether ``init_lora_weights=init`` names such a start."""
    return isinstance(init, str) and init.split("_niter_")[0] in SPLITTING


@torch.no_grad()
def place(lora: Lora, a: Tensor, b: Tensor) -> None:
    """Set the factors, given as (..., r, in) and (..., out, r)."""
    for own, new in zip(lora.matrices(), (a, b), strict=True):
        own.copy_(new)


def split(lora: Lora, a: Tensor, b: Tensor) -> None:
    """Start ``lora`` at A0 = ``a`` (..., r, in) and B0 = ``b`` (..., out, r), the rest of the weight as its base.

    The base's own weight must be in place (no other adapter's start lent).
    """
    place(lora, a, b)
    for name, own in zip(("start_A", "start_B"), lora.matrices(), strict=True):
        lora.register_buffer(name, own.detach().clone(), persistent=False)
    rest(lora)
    lora.rested = Seen(tensors=_read(lora))


def _read(lora: Lora) -> tuple[Tensor, ...]:
    """What ``rest`` reads."""
    return lora.start_A, lora.start_B, lora.site.stored


@torch.no_grad()
def rest(lora: Lora) -> None:
    """Have W - s B0 A0 stand in for the base weight, computed in float32 from the factors as they are stored."""
    w = lora.site.weight.detach()
    wide = torch.promote_types(w.dtype, torch.float32)
    a, b = (t.to(w.device, wide) for t in (lora.start_A, lora.start_B))
    if a.dim() == 2:
        left = torch.addmm(w.to(wide).flatten(1), b, a, alpha=-lora.scaling)  # in one pass over W
    else:
        left = w.to(wide) - lora.scaling * (b @ a).reshape(w.shape)
    lora.rebase(left.reshape(w.shape).to(w.dtype))


def doubled(lora: Lora, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with [A; A0] and [B, -B0] for A and B."""
    down, up = (tensors[name].detach() for name in lora.factor_names)
    a, b = lora.matrices((down, up))
    pair = torch.cat([a, lora.start_A.to(a)], dim=-2), torch.cat([b, -lora.start_B.to(b)], dim=-1)
    return tensors | dict(zip(lora.factor_names, lora.laid_out(*pair), strict=True))


def halved(lora: Lora, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``doubled`` for a file of rank 2r; A0, B0 wait in ``lora.arriving`` until all of it fits."""
    lora.arriving = None
    found = tuple(tensors.get(name) for name in lora.factor_names)
    wanted = [_twice(own.shape, lora, i) for i, own in enumerate(lora.factors())]
    if any(t is None or tuple(t.shape) != shape for t, shape in zip(found, wanted, strict=True)):
        return tensors
    a, b = lora.matrices(found)
    r = a.shape[-2] // 2
    lora.arriving = a[..., r:, :], -b[..., r:]
    return tensors | dict(zip(lora.factor_names, lora.laid_out(a[..., :r, :], b[..., :r]), strict=True))


def _twice(shape: torch.Size, lora: Lora, dim: int) -> tuple[int, ...]:
    return tuple(2 * n if i == dim else n for i, n in enumerate(shape))


def arrive(lora: Lora) -> None:
    """Take over the start that a file came with, and the base weight that goes with it."""
    if lora.arriving is not None:
        for name, own, new in zip(("start_A", "start_B"), lora.factors(), lora.arriving, strict=True):
            lora.register_buffer(name, new.detach().to(own, copy=True).contiguous(), persistent=False)
        lora.arriving = None
    before, lora.rested = lora.rested, None
    if lora.start_A is None:
        return
    if before is None or not before.unwritten() or not all(map(is_, before.tensors, _read(lora))):
        rest(lora)  # cast or moved since the start, or loaded


def doubled_config(config: Any) -> Any:
    """The settings of the rank-2r adapter: equal scales at every layer, and a start that needs no base of its own."""
    grown = math.sqrt(2) if config.use_rslora else 2
    new = copy.copy(config)
    new.r, new.lora_alpha = 2 * config.r, grown * config.lora_alpha
    new.rank_pattern = {k: 2 * r for k, r in config.rank_pattern.items()}
    new.alpha_pattern = {k: grown * alpha for k, alpha in config.alpha_pattern.items()}
    new.init_lora_weights, new.corda_config, new.lora_ga_config = True, None, None
    return new
