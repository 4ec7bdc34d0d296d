"""Uni-LoRA: one vector is all you need (Li et al., 2025, arXiv:2506.00799).

    W' = W + B A        (all A and B of all layers, as one long vector) = P theta

theta (L,) is the one trained tensor. P has one entry in each row, 1 / sqrt(count of its column), so P^T P = 1:
distances in the small space are those in the large one. Every part of theta is used equally often, in an order drawn
from ``proj_seed``. theta starts uniform, so the start is not the base model. Cost: 2 N r (in + out) FLOPs for N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, columns, input_dropout


@dataclass
class UniLoraConfig(LayerConfig):
    """Settings of Uni-LoRA. Without ``save_indices`` the order is drawn again from ``proj_seed`` at load.

    Attributes:
        r: rank of B A.
        proj_seed: seed of P.
        theta_d_length: length L of theta.
        unilora_dropout: dropout on what the change reads, in training.
        init_theta_d_bound: theta starts within this bound.
        init_weights: read from files; theta starts within its bound always.
        save_indices: keep P's order in the file; False draws it again.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    type: ClassVar[str | None] = "UNILORA"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for name in ("r", "theta_d_length", "init_theta_d_bound"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")


class Theta(nn.Module):
    """theta, the scale of each of its entries, and the order in which the layers use them."""

    def __init__(self, config: UniLoraConfig, sites: Sequence[Site]):
        super().__init__()
        bound, length = config.init_theta_d_bound, config.theta_d_length
        self.unilora_theta_d = nn.Parameter(torch.empty(length).uniform_(-bound, bound))
        each = [s for site in sites for s in ([site.one(i) for i in range(site.stack)] if site.stack else [site])]
        self.shapes = {(s.path, s.parameter): ((config.r, columns(s)), (s.out_features, config.r)) for s in each}
        self.length, self.seed = length, config.proj_seed
        self.order = self.draw()
        self.register_buffer("scale", self.counted(), persistent=False)

    def draw(self) -> Tensor:
        """Which entry of theta each entry of the As and Bs is (int32): the peer's draws."""
        total = sum(a[0] * a[1] + b[0] * b[1] for a, b in self.shapes.values())
        rng = np.random.default_rng(self.seed)
        even = np.repeat(np.arange(self.length), total // self.length)
        order = np.concatenate([even, rng.choice(self.length, total % self.length, replace=False)])
        rng.shuffle(order)
        return torch.from_numpy(order).int()

    def counted(self) -> Tensor:
        """1 / sqrt(how often each entry of theta is used)."""
        return torch.bincount(self.order, minlength=self.length).clamp_min(1).float().rsqrt()

    def indices(self, site: Site) -> list[Tensor]:
        """The entries of one layer's A (r, in) and B (out, r)."""
        start = 0
        for key, shapes in self.shapes.items():
            sizes = [a * b for a, b in shapes]
            if key == (site.path, site.parameter):
                parts = self.order[start : start + sum(sizes)].split(sizes)
                return [part.view(shape).clone() for part, shape in zip(parts, shapes)]
            start += sum(sizes)
        raise KeyError(site.path)


@method("UNILORA", UniLoraConfig)
class UniLora(Factored):
    """Low-rank factors read off one shared vector."""

    zero_start = False
    takes_shared = True
    dropout = "unilora_dropout"

    @classmethod
    def plan(cls, config: UniLoraConfig, sites: Sequence[Site]) -> Theta:
        return Theta(config, sites)

    def __init__(self, site: Site, config: UniLoraConfig, shared: Theta):
        super().__init__(site, config)
        self.unilora_dropout = input_dropout(site, config.unilora_dropout, "unilora_dropout")
        for name, value in zip("AB", shared.indices(site)):
            self.register_buffer(f"unilora_indices_{name}", value, persistent=config.save_indices)

    def ready(self) -> None:
        shared = self.shared
        if shared.unilora_theta_d.is_meta:
            return
        if shared.scale.is_meta:
            shared.scale = shared.counted().to(shared.unilora_theta_d)
        for name, value in zip("AB", shared.indices(self.site)):
            if getattr(self, f"unilora_indices_{name}").is_meta:
                setattr(self, f"unilora_indices_{name}", value.to(shared.unilora_theta_d.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.unilora_theta_d.dtype

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r): dW = B A."""
        theta = self.shared.unilora_theta_d * self.shared.scale
        return theta[self.unilora_indices_A], theta[self.unilora_indices_B]

    # ---- the peer's files hold the scale of every entry beside its index --------------------------------------------
    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key, value in tensors.items():
            out[key] = value.long()
            out[key.replace("indices", "scales")] = self.shared.scale.to(value.device)[value.long()]
        return out

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key, value in tensors.items():
            if "scales" in key:
                at, scale = tensors.get(key.replace("scales", "indices")), self.shared.scale
                if at is not None and not scale.is_meta:
                    scale[at.to(scale.device)] = value.to(scale)
            else:
                out[key] = value.int()
        return out
