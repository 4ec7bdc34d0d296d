"""OSF: Orthogonal Subspace Fine-tuning for continual learning (Nayak et al., 2025, arXiv:2504.07097).

    W = U_h S_h V_h + U_l S_l V_l        the k leading singular triplets, and the rest
    W' = U_h S_h V_h + U_l' S_l' V_l'        low part trained; gradients lose their part along the leading directions:
                                             dU_l <- (1 - U_h U_h^T) dU_l,   dV_l <- dV_l (1 - V_h^T V_h)

What the model knows already sits in the leading directions, which training can then neither change nor disturb. The
projection happens in backward, so any optimiser and loop has it. The file holds the low part; the rest follows from the
base model. Cost of a training step over the frozen layer's 4 N in out FLOPs for N tokens, with r = min(in, out) - k:
8 r in out for the change and its gradient, and 2 N in out for that of the sum; or 12 N r (in + out) where that is less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Additive
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import columns, factored, pays


@dataclass
class OSFConfig(LayerConfig):
    """Settings of OSF. ``effective_rank``: how many triplets stay, a number or a share; None: half.

    Attributes:
        effective_rank: how many triplets stay, a number or a share; None: half.
        rank_pattern: name or regex of layers: their own ``effective_rank``.
        init_weights: read from files; the start is the base model always.
        target_svd_config: refused; ``effective_rank`` and ``rank_pattern`` say the same.
    """

    effective_rank: int | float | None = None
    rank_pattern: dict[str, int | float] | None = None
    init_weights: bool = True
    target_svd_config: dict[str, int] | None = None

    type: ClassVar[str | None] = "OSF"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "effective_rank"}

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for k in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if k is not None and k < 0:
                raise ValueError(f"effective_rank must not be negative, but is {k}.")
        if self.target_svd_config:
            raise ValueError("target_svd_config has no effect; use effective_rank and rank_pattern.")


class Projected(torch.autograd.Function):
    """The identity; its gradient loses the part along ``basis``' columns (dim 0) or rows (dim 1)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, basis: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.dim = dim
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        part = basis @ (basis.mT @ grad) if ctx.dim == 0 else (grad @ basis.mT) @ basis
        return grad - part, None, None


@method("OSF", OSFConfig)
class OSF(Additive):
    """The trailing singular triplets, trained beside the leading ones."""

    again = False

    def __init__(self, site: Site, config: OSFConfig):
        super().__init__(site, config)
        most = min(site.out_features, columns(site))
        k = config.effective_rank
        self.k = most // 2 if k is None else int(k * most) if isinstance(k, float) and k < 1 else int(k)
        if self.k >= most:
            raise ValueError(
                f"effective_rank={k} keeps all {most} singular directions of '{site.path}', so nothing is left to "
                "train; lower it."
            )
        names = ("U_high", "V_high", "U_start", "S_start", "V_start")
        parts = dict(zip(names, self.split()))
        for name, value in parts.items():
            self.register_buffer(name, value, persistent=False)
        low = {"U_low": parts["U_start"], "S_low": parts["S_start"], "V_low": parts["V_start"]}
        self.osf_svd_params = nn.ParameterDict({n: nn.Parameter(v.clone()) for n, v in low.items()})

    def split(self) -> tuple[Tensor, ...]:
        """U_h (out, k), V_h (k, in), and the low U (out, r), S (r,), V (r, in) of the base weight."""
        w = self.site.weight.detach().flatten(1)
        u, s, vh = torch.linalg.svd(w.to(torch.promote_types(w.dtype, torch.float32)), full_matrices=False)
        k = self.k
        return tuple(t.contiguous() for t in (u[:, :k], vh[:k], u[:, k:], s[k:], vh[k:]))

    def ready(self) -> None:
        low = self.osf_svd_params["S_low"]
        if self.S_start.is_meta and not low.is_meta:
            self.U_high, self.V_high, self.U_start, self.S_start, self.V_start = (t.to(low) for t in self.split())

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return not pays(self.site, 2 * len(self.S_start))

    def factors(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """V (r, in) and U S (out, r) of the low part as it is now, and as it was."""
        low = self.osf_svd_params
        u = Projected.apply(low["U_low"], self.U_high, 0)
        v = Projected.apply(low["V_low"], self.V_high, 1)
        return (v, u * low["S_low"]), (self.V_start, self.U_start * self.S_start)

    def delta(self, x: Tensor) -> Tensor:
        if self.dense:
            return self.site(x, cached(self, "delta", self.delta_weight))
        (v, us), (v_start, us_start) = self.factors()
        return factored(self.site, x, torch.cat([v, v_start]), torch.cat([us, -us_start], 1))

    def delta_weight(self) -> Tensor:
        (v, us), (v_start, us_start) = self.factors()
        return torch.addmm(us @ v, us_start, v_start, alpha=-1).reshape(self.site.shape)
