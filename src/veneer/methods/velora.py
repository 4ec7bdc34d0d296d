"""VeLoRA: memory-efficient training by rank-1 sub-token projections (Miles et al., 2024, arXiv:2405.17991).

    forward  y = W x + s B A x                    as LoRA
    backward dA = s (B^T g)^T x~                   x~ = scale * (x v) v^T within each of n groups of in/n inputs

For the gradient of A only ``x v`` (N, n) is kept instead of x (N, in); v (in/n,), of length 1, is the normalised mean
of the first batch's groups ("batch_average_once"), of every batch's ("batch_average"), or random. The gradients of B
and of x are exact. Cost: as LoRA; memory N n instead of N in for the branch's input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.core.sites import Site
from veneer.methods.lora import Lora, LoraConfig


@Lora.variant("velora_config")
class Velora(Lora):
    """LoRA that keeps its input compressed for the backward pass."""

    def __init__(self, site: Site, config: LoraConfig):
        super().__init__(site, config)
        how = config.velora_config
        self.groups, self.share, self.how = how.num_groups, how.scale, how.init_type  # type: ignore[union-attr]
        if site.kernel:
            raise ValueError(
                f"VeLoRA compresses the inputs of linear layers, which the convolution '{site.path}' is not."
            )
        if site.in_features % self.groups:
            raise ValueError(
                f"VeloraConfig.num_groups={self.groups} does not divide the {site.in_features} inputs of "
                f"'{site.path}'; choose one that does, or exclude the layer."
            )
        v = torch.zeros(site.in_features // self.groups)
        self.register_buffer(
            "lora_velora_embed", F.normalize(torch.randn(v.shape), dim=0) if self.how == "random" else v
        )

    def branch(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().branch(x, dropout)
        x = F.dropout(x, dropout) if dropout else x
        a, b = self.factors()
        with torch.no_grad():
            v = self._direction(x.detach()).to(x.dtype)
        return F.linear(_Down.apply(x, a, v, self.share), b, self.lora_B.bias) * self.scaling

    def _direction(self, x: Tensor) -> Tensor:
        v = self.lora_velora_embed
        if self.how == "random":
            return v
        mean = F.normalize(x.reshape(-1, v.shape[0]).float().mean(0), dim=0).to(v)
        new = mean if self.how == "batch_average" else torch.where(v.any(), v, mean)
        v.copy_(new)
        return new


class _Down(torch.autograd.Function):
    """``x A^T`` that keeps ``x v`` of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(x.unflatten(-1, (-1, v.shape[0])) @ v, a, v)
        ctx.share = share
        return F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, a, v = ctx.saved_tensors
        dx = grad @ a if ctx.needs_input_grad[0] else None
        da = None
        if ctx.needs_input_grad[1]:
            zs = torch.einsum("nr,ng->rg", grad.flatten(0, -2), z.flatten(0, -2))  # (r, n)
            da = ctx.share * torch.einsum("rg,c->rgc", zs, v).flatten(1)
        return dx, da, None, None
