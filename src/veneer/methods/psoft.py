"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation (Wu et al., 2025, arXiv:2505.11235).

    W' = W + s B (R' - I) A,   R' = diag(b) R diag(a)       A (r, in), B (out, r) frozen,  R (r, r) orthogonal

s B A is the part of W along its r largest singular values, so that part alone is rotated (and scaled by a, b).
R = (I + Q)(I - Q)^{-1} starts at I. A and B are not saved but made again from W. Cost: 2 N r (in + r + out) FLOPs for
N tokens, against 2 N in out of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, columns, input_dropout
from veneer.ops.rotation import cayley, neumann, skew


@dataclass
class PsoftConfig(LayerConfig):
    """Settings of PSOFT.

    Attributes:
        r: dimension of the rotated subspace.
        psoft_alpha: s is alpha / r.
        psoft_dropout: dropout on what the change reads, in training.
        ab_svd_init: "psoft_init" (A orthonormal) or "pissa_init" (the root of the singular values on either side).
        psoft_svd: "full", or "lowrank" for a seeded approximation.
        psoft_svd_lowrank_niter: its iterations.
        random_seed: its seed.
        psoft_orth: rotate; False trains a plain (r, r) matrix.
        psoft_mag_b: train b.
        psoft_mag_a: train a.
        use_cayley_neumann: a series instead of the solve.
        num_cayley_neumann_terms: its length.
        cayley_neumann_eps: bound on Q's norm for the series; None: none.
        init_weights: True starts as the base model, False at random values.

    Raises:
        ValueError: an unknown ``ab_svd_init`` or ``psoft_svd``, or a number out of its range.
    """

    r: int = 32
    exclude_modules: list[str] | set[str] | str | None = None
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    type: ClassVar[str | None] = "PSOFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("ab_svd_init", ("psoft_init", "pissa_init")), ("psoft_svd", ("full", "lowrank"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not '{getattr(self, name)}'.")
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")
        if self.num_cayley_neumann_terms <= 0:
            raise ValueError(f"num_cayley_neumann_terms must be positive, not {self.num_cayley_neumann_terms}.")
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ValueError(f"cayley_neumann_eps must lie in (0, 1), not {self.cayley_neumann_eps}.")


@method("PSOFT", PsoftConfig)
class Psoft(Factored):
    """The principal part of a weight, rotated within its own subspace."""

    dropout = "psoft_dropout"

    def __init__(self, site: Site, config: PsoftConfig):
        super().__init__(site, config)
        r, most = config.r, min(site.out_features, columns(site))
        if r > most:
            raise ValueError(
                f"PSOFT at '{site.path}' rotates r={r} singular directions, but its weight has only {most}; lower r."
            )
        self.r, self.scaling, self.orthogonal = r, config.psoft_alpha / r, config.psoft_orth
        self.terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        self.eps = config.cayley_neumann_eps if self.terms else None
        self.psoft_dropout = input_dropout(site, config.psoft_dropout, "psoft_dropout")
        start = torch.zeros(r * (r - 1) // 2) if self.orthogonal else torch.eye(r)
        parts = {"weight": start if config.init_weights else start + 0.1 * torch.randn_like(start)}
        parts |= {"vector_b": torch.ones(r)} if config.psoft_mag_b else {}
        parts |= {"vector_a": torch.ones(r)} if config.psoft_mag_a else {}
        self.psoft_R = nn.ParameterDict({name: part for name, part in parts.items() if part.numel()})
        self.config = config
        self._frame()

    def _frame(self) -> None:
        a, b = principal(self.site.weight.detach().flatten(1), self.config, self.scaling)
        self.register_buffer("A", a, persistent=False)  # (r, in)
        self.register_buffer("B", b, persistent=False)  # (out, r)

    def ready(self) -> None:
        if self.A.is_meta and not self.site.stored.is_meta:  # left empty until a file is read, which does not hold it
            self._frame()

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if value.numel()}

    def rotation(self) -> Tensor:
        """diag(b) R diag(a) - I, (r, r)."""
        weight = self.psoft_R["weight"] if "weight" in self.psoft_R else self.A.new_zeros(0)  # r = 1 has no angle
        if not self.orthogonal:
            turned = weight
        else:
            q = skew(weight, self.r)
            if self.eps is not None:
                q = q * (self.eps / q.norm().clamp_min(1e-30)).clamp_max(1)
            turned = neumann(q, self.terms) if self.terms else cayley(q)
        if "vector_b" in self.psoft_R:
            turned = self.psoft_R["vector_b"][:, None] * turned
        if "vector_a" in self.psoft_R:
            turned = turned * self.psoft_R["vector_a"]
        return turned - torch.eye(self.r, dtype=turned.dtype, device=turned.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scaling * self.rotation() @ self.A, self.B


def principal(weight: Tensor, config: PsoftConfig, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) with ``scaling B A`` the part of ``weight`` along its r largest singular values."""
    w, r = weight.float(), config.r
    if config.psoft_svd == "full":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        with torch.random.fork_rng([w.device] if w.is_cuda else []):
            torch.manual_seed(config.random_seed)
            u, s, v = torch.svd_lowrank(w, q=r, niter=config.psoft_svd_lowrank_niter)
        vh = v.mT
    u, s, vh = u[:, :r], s[:r], vh[:r]
    if config.ab_svd_init == "psoft_init":
        return vh.contiguous(), u * s / scaling
    root = s.sqrt() / scaling**0.5
    return root[:, None] * vh, u * root
