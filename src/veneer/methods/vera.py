"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al., 2023, arXiv:2310.11454).

    W' = W + diag(lambda_b) B diag(lambda_d) A        lambda_b (out,), lambda_d (r,) trained

A (r, widest in) and B (widest out, r) are random, frozen, and the same for all layers, which use their first columns
and rows. lambda_d starts at ``d_initial``, lambda_b at zero. Cost: 2 N r (in + out) FLOPs for N
tokens; a training step is 4 N r (in + out) + 2 N r out over the frozen layer's 4 N in out.
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


@dataclass
class VeraConfig(LayerConfig):
    """Settings of VeRA. Without ``save_projection`` A and B are drawn again from ``projection_prng_key`` at load.

    Attributes:
        r: rank of the frozen matrices.
        projection_prng_key: seed of the frozen random matrices.
        save_projection: whether the frozen matrices stand in the file; False draws them again at load.
        vera_dropout: dropout on what the change reads, in training.
        d_initial: what lambda_d starts at.
        init_weights: True starts as the base model, False at random values.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    type: ClassVar[str | None] = "VERA"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


class Projections(nn.Module):
    """Two frozen random matrices (down, widest in) and (widest out, up), drawn on the CPU from a seed."""

    def __init__(self, prefix: str, sites: Sequence[Site], down: int, up: int, seed: int, saved: bool):
        super().__init__()
        self.names = f"{prefix}_A", f"{prefix}_B"
        self.shapes = (down, max(columns(s) for s in sites)), (max(s.out_features for s in sites), up)
        self.seed = seed
        for name, value in zip(self.names, self.draw()):
            self.register_buffer(name, value, persistent=saved)

    def draw(self) -> list[Tensor]:
        """Kaiming-uniform with the gain of a ReLU: the peer's draws."""
        generator = torch.Generator().manual_seed(self.seed)
        bounds = (math.sqrt(6 / shape[1]) for shape in self.shapes)
        return [torch.empty(s).uniform_(-b, b, generator=generator) for s, b in zip(self.shapes, bounds)]

    def restore(self, like: Tensor) -> None:
        """Draw again what was left empty on the meta device and is in no file."""
        for name, value in zip(self.names, self.draw()):
            if getattr(self, name).is_meta and name in self._non_persistent_buffers_set:
                setattr(self, name, value.to(like))

    def cut(self, site: Site) -> tuple[Tensor, Tensor]:
        """A (down, in) and B (out, up) for one layer."""
        a, b = (getattr(self, name) for name in self.names)
        return a[:, : columns(site)], b[: site.out_features]


@method("VERA", VeraConfig)
class Vera(Factored):
    """Two trained vectors around the shared random matrices."""

    dropout = "vera_dropout"

    @classmethod
    def plan(cls, config: VeraConfig, sites: Sequence[Site]) -> Projections:
        return Projections("vera", sites, config.r, config.r, config.projection_prng_key, config.save_projection)

    def __init__(self, site: Site, config: VeraConfig):
        super().__init__(site, config)
        self.vera_dropout = input_dropout(site, config.vera_dropout, "vera_dropout")
        self.vera_lambda_b = nn.Parameter(torch.zeros(site.out_features))
        self.vera_lambda_d = nn.Parameter(torch.full((config.r,), config.d_initial))
        if not config.init_weights:
            nn.init.normal_(self.vera_lambda_d)
            nn.init.normal_(self.vera_lambda_b)

    def ready(self) -> None:
        if not self.vera_lambda_b.is_meta:
            self.shared.restore(self.vera_lambda_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r), both scales in B, so that A is frozen: dW = B A."""
        a, b = self.shared.cut(self.site)
        return a, self.vera_lambda_b[:, None] * b * self.vera_lambda_d
