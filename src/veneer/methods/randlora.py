"""RandLoRA: full-rank updates from random bases (Albert et al., 2025, arXiv:2502.00987).

    W' = W + s sum_n B_n diag(lambda_n) A diag(gamma_n)        n = 1 ... N = ceil(min(in, out) / r), s = alpha / r

A (r, shorter side) and the B_n (longer side, r) are random, frozen and shared by all layers, which use their first rows
and columns; lambda (r, N) starts at zero, gamma (N, shorter side) constant; where the input is the longer side the
sum is transposed. Cost of a training step: the factors hold more than the weight, m = r N >= min(in, out), so the
change is made; and made again in the backward pass, since it is as large as the layer, and what it is made of larger.
With its gradients that is 6 m in out FLOPs over the 6 T in out of a trained weight for T tokens: the floor
is 1.5 (1 + m / T) of the frozen layer's 4 T in out (m = 512, T = 1024: 2.25). In eval the sum is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, columns, input_dropout
from veneer.ops.lowrank import LowRank


@dataclass
class RandLoraConfig(LayerConfig):
    """Settings of RandLoRA. Without ``save_projection`` the bases are drawn again from ``projection_prng_key``.

    ``sparse``: bases of -1, 0, 1 with two thirds zeros; ``very_sparse``: all but 1 / sqrt(shorter side) zeros.

    Attributes:
        r: rank of each base; fewer make more bases.
        projection_prng_key: seed of the frozen random matrices.
        save_projection: whether the frozen matrices stand in the file; False draws them again at load.
        sparse: bases of -1, 0, 1 with two thirds zeros.
        very_sparse: all but 1 / sqrt(shorter side) zeros.
        randlora_dropout: dropout on what the change reads, in training.
        randlora_alpha: s is alpha / r.
        init_weights: True starts as the base model, False at random values.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: int = 640
    init_weights: bool = True

    type: ClassVar[str | None] = "RANDLORA"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


class Bases(nn.Module):
    """A (r, 1, short) and B (long, N, r), drawn on the CPU from a seed and divided by their standard deviation."""

    def __init__(self, config: RandLoraConfig, sites: Sequence[Site]):
        super().__init__()
        sides = max(columns(s) for s in sites), max(s.out_features for s in sites)
        self.short, self.long, self.r = min(sides), max(sides), config.r
        self.seed, self.sparse, self.very_sparse = config.projection_prng_key, config.sparse, config.very_sparse
        for name, value in self.draw().items():
            self.register_buffer(name, value, persistent=config.save_projection)

    def draw(self) -> dict[str, Tensor]:
        """The peer's draws: dense ones in bfloat16, one basis after the other."""
        generator, count = torch.Generator().manual_seed(self.seed), math.ceil(self.short / self.r)
        if self.sparse or self.very_sparse:
            edge = 0.5 / (math.sqrt(self.short) if self.very_sparse else 3)

            def signs(*shape: int) -> Tensor:
                u = torch.rand(shape, generator=generator)
                return (u > 1 - edge).float() - (u < edge).float()

            a, b = signs(self.r, 1, self.short), signs(self.long, count, self.r)
        else:

            def uniform(*shape: int) -> Tensor:
                bound = 1 / math.sqrt(shape[2])
                return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)

            a = uniform(self.r, 1, self.short)
            b = torch.cat([uniform(self.long, 1, self.r) for _ in range(count)], 1)
        return {"randlora_A": (a / a.std()).float(), "randlora_B": (b / b.std()).float()}

    def restore(self, like: Tensor) -> None:
        """Draw again what was left empty on the meta device and is in no file."""
        for name, value in self.draw().items():
            if getattr(self, name).is_meta and name in self._non_persistent_buffers_set:
                setattr(self, name, value.to(like))


@method("RANDLORA", RandLoraConfig)
class RandLora(Factored):
    """Trained diagonals between shared random bases."""

    dropout = "randlora_dropout"

    @classmethod
    def plan(cls, config: RandLoraConfig, sites: Sequence[Site]) -> Bases:
        return Bases(config, sites)

    def __init__(self, site: Site, config: RandLoraConfig):
        super().__init__(site, config)
        self.short, self.long = sorted((columns(site), site.out_features))
        self.count = math.ceil(self.short / config.r)
        self.scaling = config.randlora_alpha / config.r
        self.saved = config.save_projection
        self.randlora_dropout = input_dropout(site, config.randlora_dropout, "randlora_dropout")
        start = torch.zeros if config.init_weights else torch.randn
        self.randlora_lambda = nn.Parameter(start(config.r, self.count))
        gamma = torch.full((self.count, self.short), 1 / max(self.count, self.short))
        self.randlora_gamma = nn.Parameter(gamma)

    def ready(self) -> None:
        if not self.randlora_lambda.is_meta:
            self.shared.restore(self.randlora_lambda)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        """The factors hold more than their product, so that is made; dropout is for them alone."""
        return not (self.training and self.randlora_dropout.p)

    def low_rank(self) -> LowRank | None:
        return None if self.dense else super().low_rank()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down (N r, in) and up (out, N r), scale included."""
        shared = self.shared
        b = shared.randlora_B[: self.long, : self.count].flatten(1)  # (long, N r); which N columns are a basis is free,
        a = shared.randlora_A[:, :, : self.short] * self.randlora_lambda.unsqueeze(-1)  # (r, N, short)
        a = self.scaling * (a * self.randlora_gamma).flatten(0, 1)  # and the peer's files take every r-th
        return (a, b) if columns(self.site) == self.short else (b.mT, a.mT)

    # ---- the peer's files repeat the shared bases at each layer -----------------------------------------------------
    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | (dict(self.shared.named_buffers()) if self.saved else {})

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in tensors.items() if k not in ("randlora_A", "randlora_B")}
