"""PVeRA: Probabilistic Vector-based Random Matrix Adaptation (Fillioux et al., 2025, arXiv:2512.07703).

    (mu, log sigma^2) = lambda_d * (A x)        A (2r, widest in), lambda_d (2r,)
    y = W x + lambda_b * B (mu + sigma e)       e ~ N(0, 1) for each token, B (widest out, r), lambda_b (out,)

A and B are random, frozen and shared as in VeRA. Noise is drawn in training, and in eval where ``sample_at_inference``
asks for it; a merge holds the mean. Cost: 2 N r (2 in + out) FLOPs for N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig, newer
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, down, factored, input_dropout, up
from veneer.methods.vera import Projections
from veneer.ops.lowrank import LowRank


@dataclass
class PveraConfig(LayerConfig):
    """Settings of PVeRA.

    ``kl_weight`` adds that much of the mean KL divergence from N(0, 1) to the loss.

    Attributes:
        r: rank of the frozen matrices.
        projection_prng_key: seed of the frozen random matrices.
        save_projection: whether the frozen matrices stand in the file; False draws them again at load.
        pvera_dropout: dropout on what the change reads, in training.
        d_initial: what lambda_d starts at.
        init_weights: True starts as the base model, False at random values.
        sample_at_inference: draw noise in eval too.
        generator_seed: seed of the noise.
        kl_weight: weight of the KL divergence from N(0, 1) in the loss.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None
    kl_weight: float = newer(0.0)

    type: ClassVar[str | None] = "PVERA"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


@method("PVERA", PveraConfig)
class Pvera(Factored):
    """VeRA whose inner features are drawn from a normal distribution."""

    @classmethod
    def plan(cls, config: PveraConfig, sites: Sequence[Site]) -> Projections:
        r, seed = config.r, config.projection_prng_key
        return Projections("pvera", sites, 2 * r, r, seed, config.save_projection)

    def __init__(self, site: Site, config: PveraConfig):
        super().__init__(site, config)
        if not site.maps_input or getattr(site, "groups", 1) > 1:
            raise ValueError(
                f"PVeRA draws noise for each token between its two matrices, which '{site.path}' does not allow: "
                "only its weight can be reached, or its channels are grouped. Exclude it or choose VeRA."
            )
        self.r, self.always, self.kl_weight = config.r, config.sample_at_inference, config.kl_weight
        self.seed = config.generator_seed
        self.generator: torch.Generator | None = None
        self.last: Tensor | None = None
        self.pvera_dropout = input_dropout(site, config.pvera_dropout, "pvera_dropout")
        self.pvera_lambda_b = nn.Parameter(torch.zeros(site.out_features))
        self.pvera_lambda_d = nn.Parameter(torch.full((2 * config.r,), config.d_initial))
        if not config.init_weights:
            nn.init.normal_(self.pvera_lambda_d)
            nn.init.normal_(self.pvera_lambda_b)

    def ready(self) -> None:
        if not self.pvera_lambda_b.is_meta:
            self.shared.restore(self.pvera_lambda_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r), scaled, without noise: dW = B A."""
        a, b = self.shared.cut(self.site)
        return self.pvera_lambda_d[: self.r, None] * a[: self.r], self.pvera_lambda_b[:, None] * b

    def delta(self, x: Tensor) -> Tensor:
        x = self.pvera_dropout(x) if x.is_floating_point() else x
        if not (self.training or self.always):
            return factored(self.site, x, *self.known_factors())
        a, b = self.shared.cut(self.site)
        mu, logvar = (down(self.site, x, a) * self.pvera_lambda_d).chunk(2, -1)  # (..., r)
        if self.kl_weight and self.training:
            self.last = (mu.square() + logvar.exp() - 1 - logvar).mean() / 2
        z = mu + (logvar / 2).exp() * self.noise(mu)
        return up(self.site, z, self.pvera_lambda_b[:, None] * b)

    def noise(self, like: Tensor) -> Tensor:
        """N(0, 1), from the generator that ``generator_seed`` started, else torch's own."""
        if self.seed is None:
            return torch.randn_like(like)
        if self.generator is None or self.generator.device != like.device:
            self.generator = torch.Generator(like.device).manual_seed(self.seed)
        return torch.randn(like.shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def penalty(self) -> Tensor | None:
        return None if self.last is None else self.kl_weight * self.last

    def low_rank(self) -> LowRank | None:
        return None if self.training or self.always else super().low_rank()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"generator": None, "last": None}
