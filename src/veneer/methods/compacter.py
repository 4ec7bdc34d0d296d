"""Compacter (Karimi Mahabadi, Henderson, Ruder, 2021, arXiv:2106.04647).

    W = sum_i A_i kron (s_i t_i)        A (n, n, n) shared by all places, s (n, out / n, 1), t (n, 1, in / n)

A bottleneck adapter whose two matrices are such sums. ``placement="pfeiffer"`` makes it Compacter++. The up matrix
has s = 0 at the start, so the start is the base. Cost: as the bottleneck; it stores 2 (m + dim)
numbers a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.bottleneck import NON_LINEARITIES, BottleneckConfig, Inserted, widths


@dataclass
class CompacterConfig(BottleneckConfig):
    """Settings of Compacter: those of a bottleneck adapter, and ``phm_dim``, the n above.

    Attributes:
        phm_dim: the n above; must divide the module's width and the bottleneck's.

    Raises:
        ValueError: at ``get_peft_model``: ``phm_dim`` divides a module's width or its bottleneck's not.
    """

    placement: str = "houlsby"
    reduction_factor: float = 32
    non_linearity: str = "gelu_new"
    phm_dim: int = 4

    type: ClassVar[str | None] = "COMPACTER"

    def check(self) -> None:
        """Refuse a senseless n."""
        super().check()
        if self.phm_dim < 1:
            raise ValueError(f"phm_dim must be a positive integer, not {self.phm_dim}.")
        if self.scaling == "learned":
            raise ValueError("Compacter has no learned scaling; give a number.")


class Rule(nn.Module):
    """The A that all places share."""

    def __init__(self, n: int):
        super().__init__()
        self.phm_rule = nn.Parameter(torch.randn(n, n, n))


def phm(A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """sum_i A_i kron (s_i t_i): (n, n, n), (n, a, 1), (n, 1, b) -> (n a, n b)."""
    return torch.einsum("ijk,iar,irb->jakb", A, s, t).flatten(2).flatten(0, 1)


@method("COMPACTER", CompacterConfig)
class Compacter(Inserted):
    """A bottleneck of Kronecker sums."""

    takes_shared = True

    @classmethod
    def plan(cls, config: Any, sites: Sequence[Site]) -> nn.Module:
        return Rule(config.phm_dim)

    def __init__(self, site: Site, config: CompacterConfig, shared: nn.Module):
        super().__init__(site, config)
        self.parallel = config.placement == "parallel"
        read, given = widths(site)
        read = read if self.parallel else given
        n = config.phm_dim
        m = -(-config.size(read) // n) * n
        if read % n or given % n:
            raise ValueError(
                f"phm_dim={n} does not divide the width of '{site.path}', which reads {read} and gives {given}; choose "
                "a divisor of both."
            )
        self.phm_down_s = nn.Parameter(torch.randn(n, m // n, 1))
        self.phm_down_t = nn.Parameter(torch.randn(n, 1, read // n) * (n * read) ** -0.5)
        self.phm_down_bias = nn.Parameter(torch.zeros(m))
        self.phm_up_s = nn.Parameter(torch.zeros(n, given // n, 1))
        self.phm_up_t = nn.Parameter(torch.randn(n, 1, m // n) * (n * m) ** -0.5)
        self.phm_up_bias = nn.Parameter(torch.zeros(given))
        if not config.init_weights:
            nn.init.normal_(self.phm_up_s, std=0.02)
        self.f, self.p, self.scale = config.non_linearity, config.bottleneck_dropout, float(config.scaling)

    def added(self, h: Tensor) -> Tensor:
        A = self.shared.phm_rule
        h = F.dropout(h, self.p, self.training)
        h = NON_LINEARITIES[self.f](F.linear(h, phm(A, self.phm_down_s, self.phm_down_t), self.phm_down_bias))
        return self.scale * F.linear(h, phm(A, self.phm_up_s, self.phm_up_t), self.phm_up_bias)
