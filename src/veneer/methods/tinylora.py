"""TinyLoRA (2026, arXiv:2602.04118) and LoRA-XS (Balazy et al., 2024, arXiv:2405.17604).

    LoRA-XS    W' = W + B R A        B = U_r sqrt(S_r) (out, r), A = sqrt(S_r) V_r^T (r, in) of the weight's SVD, frozen
    TinyLoRA   R = sum_i v_i P_i     P_i (r, r) ~ N(0, 1/r) frozen, v (u,) trained, shared by groups of layers

R of LoRA-XS starts at N(0, 1e-5), v of TinyLoRA at zero. Cost: 2 N r (in + out) FLOPs for N tokens. The factors are in
the file: an SVD's signs differ between machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, columns, input_dropout
from veneer.ops.factor import top_svd


@dataclass
class TinyLoraConfig(LayerConfig):
    """Settings of TinyLoRA. ``weight_tying``: 0 a vector for each layer, 1 one for all, between them by groups.

    Attributes:
        r: number of singular directions.
        u: length of the trained vector.
        weight_tying: 0 a vector for each layer, 1 one for all, between them by groups.
        projection_seed: seed of the frozen random matrices.
        save_projection: whether the frozen matrices stand in the file; False draws them again at load.
        init_v_bound: v starts within this bound where ``init_weights`` is False.
        tinylora_dropout: dropout on what the change reads, in training.
        init_weights: True starts as the base model, False at random values.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    init_weights: bool = True

    type: ClassVar[str | None] = "TINYLORA"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for name in ("r", "u"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)}.")
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"weight_tying must lie in [0, 1], not {self.weight_tying}.")


@dataclass
class LoraXSConfig(LayerConfig):
    """Settings of LoRA-XS. ``init_std`` is the spread that R starts with.

    Attributes:
        r: number of singular directions.
        lora_xs_alpha: the change is scaled by alpha / r; None: 1.
        lora_xs_dropout: dropout on what the change reads, in training.
        init_std: the spread that R starts with.
    """

    r: int = 16
    lora_xs_alpha: float | None = None
    lora_xs_dropout: float = 0.0
    init_std: float = 1e-5

    type: ClassVar[str | None] = "LORA_XS"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


class BetweenFactors(Factored):
    """dW = B R A between a weight's own singular directions; a method writes ``middle``."""

    prefix: ClassVar[str]
    dropout = "input_dropout"

    def __init__(self, site: Site, config: Any):
        super().__init__(site, config)
        most = min(site.out_features, columns(site))
        if config.r > most:
            raise ValueError(
                f"r={config.r} singular directions are wanted of '{site.path}', whose weight has only {most}; lower r."
            )
        self.input_dropout = input_dropout(site, getattr(config, f"{self.prefix}_dropout"), f"{self.prefix}_dropout")
        u, s, v = top_svd(site.weight.flatten(1), config.r)
        a, b = (s.sqrt()[:, None] * v.mT), u * s.sqrt()
        if site.kind == "embedding":  # the file's factors are those of the stored table (vocab, dim)
            a, b = b.mT, a.mT
        self.register_buffer(f"{self.prefix}_A", a.contiguous())
        self.register_buffer(f"{self.prefix}_B", b.contiguous())

    def middle(self) -> Tensor:
        """R (r, r)."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down (r, in) and up (out, r)."""
        a, b, r = getattr(self, f"{self.prefix}_A"), getattr(self, f"{self.prefix}_B"), self.middle()
        if self.site.kind == "embedding":
            return b.mT, (r @ a).mT
        return a, b @ r


class Vectors(nn.Module):
    """The trained vectors, and which layer uses which."""

    def __init__(self, config: TinyLoraConfig, sites: Sequence[Site]):
        super().__init__()
        each = [s for site in sites for s in ([site.one(i) for i in range(site.stack)] if site.stack else [site])]
        self.order = {(s.path, s.parameter): i for i, s in enumerate(each)}
        groups = max(1, round(len(each) * (1 - config.weight_tying)))
        self.size, self.last = max(1, len(each) // groups), groups - 1
        bound = 0.0 if config.init_weights else config.init_v_bound
        start = [
            torch.empty(config.u).uniform_(-bound, bound) if bound else torch.zeros(config.u) for _ in range(groups)
        ]
        self.tinylora_v = nn.ParameterList(start)

    def number(self, site: Site) -> int:
        """Which layer this is, counted through the adapter."""
        return self.order[site.path, site.parameter]

    def vector(self, number: int) -> Tensor:
        """v of the layer with this number."""
        return self.tinylora_v[min(number // self.size, self.last)]


@method("TINYLORA", TinyLoraConfig)
class TinyLora(BetweenFactors):
    """A few trained numbers between the weight's singular directions."""

    prefix = "tinylora"
    takes_shared = True

    @classmethod
    def plan(cls, config: TinyLoraConfig, sites: Sequence[Site]) -> Vectors:
        return Vectors(config, sites)

    def __init__(self, site: Site, config: TinyLoraConfig, shared: Vectors):
        super().__init__(site, config)
        self.number = shared.number(site)
        self.seed, self.shape = config.projection_seed + self.number, (config.u, config.r, config.r)
        self.register_buffer("tinylora_P", self.draw(), persistent=config.save_projection)

    def draw(self) -> Tensor:
        """P (u, r, r): the peer's draws."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.shape, generator=generator) / math.sqrt(self.shape[1])

    def ready(self) -> None:
        if self.tinylora_P.is_meta and not self.tinylora_A.is_meta:
            self.tinylora_P = self.draw().to(self.tinylora_A)

    def middle(self) -> Tensor:
        return torch.einsum("u,urs->rs", self.shared.vector(self.number), self.tinylora_P)


@method("LORA_XS", LoraXSConfig)
class LoraXS(BetweenFactors):
    """A small trained matrix between the weight's singular directions."""

    prefix = "lora_xs"
    zero_start = False

    def __init__(self, site: Site, config: LoraXSConfig):
        super().__init__(site, config)
        self.scaling = 1.0 if config.lora_xs_alpha is None else config.lora_xs_alpha / config.r
        self.lora_xs_R = nn.Parameter(config.init_std * torch.randn(config.r, config.r))

    def middle(self) -> Tensor:
        return self.scaling * self.lora_xs_R
