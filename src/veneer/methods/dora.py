"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., 2024, arXiv:2402.09353).

    W' = m / n * V        V = W + s B A,   n_i = ||V_i|| over all but the output dimension,   m (out,) trained

m starts at n, so the start is the base model (or V, where A and B start so). n counts as a constant in the backward
pass (section 4.3 of the paper): dL/dV = (m / n) dL/dW'. It is computed without building V, from

    n_i^2 = ||W_i||^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T

Cost beside LoRA: 2 r in out FLOPs a step for W A^T, nothing that grows with the number of tokens but two element-wise
products; in eval mode n is kept until a tensor changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.core.adapter import Base, Weight
from veneer.core.cache import cached
from veneer.core.sites import Site
from veneer.methods.lora import Lora, LoraConfig, LoraEmbedding, LoraWeight
from veneer.ops.lowrank import LowRank

ROWS_AT_ONCE = 1 << 22
"""Entries of W that are widened to float32 at a time."""


@Lora.variant("use_dora")
class Dora(Lora):
    """``y = b + (m / n) (W x + s B A x)``, from the layer's own output."""

    reads_weight = True

    def __init__(self, site: Site, config: LoraConfig):
        super().__init__(site, config)
        if site.kind == "conv" and config.r % site.groups:
            raise ValueError(
                f"DoRA at '{site.path}' needs a rank that its {site.groups} groups divide, not {config.r}; set one "
                "with rank_pattern or exclude the layer."
            )
        self._bias_trains = config.bias != "none"
        self._known: Remembered | None = None
        self._squares: Remembered | None = None
        split = self.residual is not None  # then W_res + s B A is W itself
        n = site.weight.detach().float().flatten(self._rows()).norm(dim=-1) if split else self._norm()
        shape = (1, -1, *[1] * len(site.kernel)) if site.kernel else n.shape
        self.lora_magnitude_vector = nn.Parameter(n.reshape(shape))

    def _rows(self) -> int:
        """The first dimension of the weight that a row's norm runs over."""
        return 2 if self.site.stack else 1

    def train(self, mode: bool = True) -> Dora:
        self._known = self._squares = None
        return super().train(mode)

    # ---- the norm ---------------------------------------------------------------------------------------------------
    def gain(self) -> Tensor:
        """m / n: (out,), or (experts, out)."""
        return cached(self, "gain", self._gain, self.site.stored)

    def _gain(self) -> Tensor:
        n = self.norm()
        return self.lora_magnitude_vector.reshape(n.shape) / n.to(self.lora_magnitude_vector)

    def norm(self) -> Tensor:
        """n, remembered in eval mode for as long as the very same tensors hold the very same values."""
        if self.training or torch.compiler.is_compiling():
            return self._norm()
        self._known = _remembered(self._known, (self.site.stored, *self.factors()), self._norm)
        return self._known[2]

    @torch.no_grad()
    def _norm(self) -> Tensor:
        weight = self.site.weight
        a, b = self.matrices()
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(weight.device, wide), b.to(weight.device, wide)
        w = weight.reshape(*b.shape[:-1], a.shape[-1])  # (..., out, n)
        if torch.compiler.is_compiling():
            squares = _squares(w, wide)
        else:
            self._squares = _remembered(self._squares, (self.site.stored,), lambda: _squares(w, wide))
            squares = self._squares[2]
        # In W's own dtype: the branch itself is computed in it, and a wide copy of W would cost more than the product.
        wa = (w @ a.to(w.dtype).mT).to(wide)
        own = ((b @ (a @ a.mT)) * b).sum(-1)
        n = (squares + 2 * self.scaling * (wa * b).sum(-1) + self.scaling**2 * own).clamp_min(0).sqrt()
        return n.reshape(weight.shape[: self._rows()])

    def low_rank(self) -> LowRank | None:
        if type(self) is not Dora or self.site.kernel or self._bias_trains:
            return None  # a trained bias is in the layer's output, but is not to be scaled
        return self._low_rank(self.gain())

    # ---- the layer --------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        h, z = x.to(self.dtype) if x.is_floating_point() else x, y
        if self.training and self.lora_dropout.p and x.is_floating_point():
            h = self.lora_dropout(h)  # both halves of V see the same dropped input
            z = base(h.to(x.dtype))
        bias = self._bias(x, base)
        if bias is not None:
            z = z - bias
        g = self.gain()
        g = g.reshape(-1, *[1] * len(self.site.kernel))
        return y + ((g - 1) * z + g * self.branch(h)).to(y.dtype)

    def _bias(self, x: Tensor, base: Base) -> Tensor | None:
        bias = self.site.bias
        if bias is None:
            return None
        if self._bias_trains:  # a trained bias stands in for the layer's own: what the layer makes of zeros
            return base(torch.zeros_like(x[:1]))
        return bias.reshape(-1, *[1] * len(self.site.kernel))

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        g = self.gain().to(weight)
        g = g.reshape(*g.shape, *[1] * (weight.dim() - g.dim()))
        return g * (weight + Lora.delta_weight(self).to(weight)), bias

    def delta_weight(self) -> Tensor:
        """W' - W, for this base weight."""
        weight = self.site.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.merged(weight, None)[0] - weight

    def delta_factors(self) -> None:
        return None

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = "lora_magnitude_vector.weight"
        tensors = super().incoming({k.removesuffix(".weight") if k == old else k: v for k, v in tensors.items()})
        if self.site.kernel:
            self.matrices()  # refuses factors that reach across the layer's groups
        return tensors


class DoraEmbedding(Dora, LoraEmbedding):
    """DoRA on an embedding: one magnitude for each of its columns."""


class DoraWeight(Dora, LoraWeight):
    """DoRA on a bare parameter or a stack of experts: a magnitude for each row of each matrix."""


Dora.embedding, Dora.parameter = DoraEmbedding, DoraWeight


def _squares(w: Tensor, wide: torch.dtype) -> Tensor:
    """The squared norms of the rows of w, a piece at a time widened."""
    step = max(1, ROWS_AT_ONCE // max(1, w.shape[-1] * w.shape[:-2].numel()))
    return torch.cat([part.to(wide).square().sum(-1) for part in w.split(step, dim=-2)], dim=-1)


Remembered = tuple[tuple[Tensor, ...], list[tuple[int, int]], Tensor]
"""Tensors, what marked their values, and what was computed from them."""


def _remembered(known: Remembered | None, tensors: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Remembered:
    """``known``, or, where it does not belong to these tensors as they are now, a new one."""
    if any(t.is_inference() for t in tensors):
        return tensors, [], make()  # such tensors do not count their changes
    marks = [(t.data_ptr(), t._version) for t in tensors]
    if known is not None and known[1] == marks and all(a is b for a, b in zip(known[0], tensors, strict=True)):
        return known
    return tensors, marks, make()
