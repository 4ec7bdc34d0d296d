"""AdaMSS: Adaptive Multi-Subspaces (NeurIPS 2025, openreview 8ZdWmpYxT0).

    [W | b] ~ U S V^T of rank r;  the rows of U fall into K clusters
    W'[rows_c] = W[rows_c] + B_c A_c V^T        A_c (rank, r), B_c (rows of c, rank), V^T (r, in + 1) frozen

The bias, where there is one, is the weight's last column. B starts at zero and A with orthonormal rows. V^T is in the
file; which rows make a cluster follows from the base model (a seeded sketch and k-means: the peer's clusters).
With ``use_asa`` the number of subspaces that train falls from ``init_warmup`` to ``final_warmup`` to the target, by an
importance smoothed as AdaLoRA's; those left out keep what they have learnt. Cost: 2 N (r in + rank (K r + out)) FLOPs
for N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from veneer.core.adapter import Stacked
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, along, columns, factored
from veneer.ops.cluster import kmeans
from veneer.ops.lowrank import LowRank


@dataclass
class AdamssConfig(LayerConfig):
    """Settings of AdaMSS.

    With ``use_dynamic_rank`` a subspace's rank counts the directions in which its rows of U have more than
    ``svd_threshold`` times the power of the first.

    Attributes:
        r: rank of the seeded sketch of the weight.
        num_subspaces: clusters of its rows.
        subspace_rank: rank that trains in each cluster.
        init_weights: "orthogonal", or None for a Kaiming-uniform A.
        use_asa: let fewer subspaces train as time goes on.
        asa_target_subspaces: how many train in the end, over all layers.
        init_warmup: steps in which all of them train.
        final_warmup: the step at which the target is reached.
        mask_interval: steps between two choices.
        asa_importance_beta: smoothing of the importance.
        asa_uncertainty_beta: smoothing of its uncertainty.
        asa_schedule_exponent: how fast the number falls; 3 is a cubic.
        use_dynamic_rank: a rank of its own for each subspace, at most ``subspace_rank``.
        svd_threshold: share of the first direction's power that a direction must have to count.
        random_seed: seed of the sketch.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: str | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    type: ClassVar[str | None] = "ADAMSS"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for name in ("r", "num_subspaces", "subspace_rank"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)}.")
        if self.init_weights not in ("orthogonal", None):
            raise ValueError(f"init_weights must be 'orthogonal' or None, not '{self.init_weights}'.")
        if self.use_asa:
            for name in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent"):
                if getattr(self, name) <= 0:
                    raise ValueError(f"{name} must be positive, not {getattr(self, name)}.")
            if self.init_warmup >= self.final_warmup:
                raise ValueError(f"init_warmup={self.init_warmup} must come before final_warmup={self.final_warmup}.")

    def budget(self, step: int, total: int) -> int:
        """How many subspaces train after this step."""
        target = min(self.asa_target_subspaces, total)
        if step <= self.init_warmup:
            return total
        left = 1 - min(1.0, (step - self.init_warmup) / (self.final_warmup - self.init_warmup))
        return target + round((total - target) * left**self.asa_schedule_exponent)


@method("ADAMSS", AdamssConfig)
class Adamss(Factored):
    """Low-rank changes of clusters of rows, all in one subspace of inputs."""

    def __init__(self, site: Site, config: AdamssConfig):
        super().__init__(site, config)
        self.with_bias = site.bias is not None and site.maps_input
        u, v = sketch(self.matrix(), config.r, config.random_seed)
        clusters = kmeans(u.float().cpu().numpy(), min(config.num_subspaces, len(u)))
        self.rows = [torch.from_numpy(np.flatnonzero(clusters == c)) for c in range(clusters.max() + 1)]
        self.register_buffer("order", torch.argsort(torch.cat(self.rows)), persistent=False)
        self.register_buffer("adamss_newB", v.mT.contiguous())  # (r, in + 1)
        self.adamss_A, self.adamss_B = nn.ParameterList(), nn.ParameterList()
        for rows in self.rows:
            rank = min(config.subspace_rank, len(rows), u.shape[1])
            if config.use_dynamic_rank:
                power = torch.linalg.svdvals(u[rows].float()).square()
                rank = min(rank, max(1, int((power > config.svd_threshold * power[0]).sum())))
            a = torch.empty(rank, u.shape[1])
            a = nn.init.orthogonal_(a) if config.init_weights else nn.init.kaiming_uniform_(a)
            self.adamss_A.append(a)
            self.adamss_B.append(torch.zeros(len(rows), rank))
        self.out_of_budget: frozenset[int] = frozenset()
        self.importance: dict[str, tuple[Tensor, Tensor]] = {}

    def matrix(self) -> Tensor:
        """[W | b], (out, in + 1)."""
        w = self.site.weight.detach().flatten(1)
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        return torch.cat([w, self.site.bias.detach().to(w)[:, None]], 1) if self.with_bias else w

    @property
    def fixed(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(f"adamss_{m}.{c}" for m in "AB" for c in self.out_of_budget)

    def ready(self) -> None:
        if self.order.is_meta and not self.adamss_newB.is_meta:
            self.order = torch.argsort(torch.cat(self.rows)).to(self.adamss_newB.device)

    def both(self) -> tuple[Tensor, Tensor]:
        """A_c V^T of all clusters, stacked (total rank, in, + 1 with a bias), and B_c (out, total rank), else zero."""
        return torch.cat(list(self.adamss_A)) @ self.adamss_newB, torch.block_diag(*self.adamss_B)[self.order]

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.both()
        return a[:, : columns(self.site)], b

    def delta_bias(self) -> Tensor | None:
        if not self.with_bias:
            return None
        a, b = self.both()
        return b @ a[:, -1]

    def low_rank(self) -> LowRank | None:
        return None if self.with_bias else super().low_rank()

    def delta(self, x: Tensor) -> Tensor:
        if not self.with_bias:
            return super().delta(x)
        a, b = cached(self, "both", self.both)
        return factored(self.site, x, a[:, : columns(self.site)], b) + along(self.site, b @ a[:, -1])

    def training_state(self) -> dict[str, Tensor]:
        names = ("smooth", "uncertain")
        return {f"{key}.{n}": t for key, both in self.importance.items() for n, t in zip(names, both, strict=True)} | {
            "out_of_budget": torch.tensor(sorted(self.out_of_budget), dtype=torch.long)
        }

    def resume(self, state: dict[str, Tensor]) -> None:
        keys = {key.rpartition(".")[0] for key in state if key.endswith(".smooth")}
        device = self.adamss_newB.device
        self.importance = {k: (state[f"{k}.smooth"].to(device), state[f"{k}.uncertain"].to(device)) for k in keys}
        self.out_of_budget = frozenset(state["out_of_budget"].tolist()) if "out_of_budget" in state else frozenset()

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for c, rows in enumerate(self.rows):
            b = tensors.get(f"adamss_B.{c}")
            if b is not None and len(b) != len(rows):
                raise ValueError(
                    f"AdaMSS at '{self.site.path}' finds {len(rows)} rows in cluster {c} of the base weight, "
                    f"but the file has {len(b)}: it was trained on another base model, or on weights of another "
                    "precision."
                )
        for name, own in (("adamss_A", self.adamss_A), ("adamss_B", self.adamss_B)):
            for c, parameter in enumerate(own):  # the ranks may be the file's
                found = tensors.get(f"{name}.{c}")
                if found is not None and found.shape != parameter.shape:
                    own[c] = nn.Parameter(parameter.new_zeros(found.shape), parameter.requires_grad)
        return tensors

    # ---- which subspaces train --------------------------------------------------------------------------------------
    def observe(self, config: AdamssConfig) -> None:
        """Smooth the sensitivity |p g| of every entry, and how much it wavers."""
        b1, b2 = config.asa_importance_beta, config.asa_uncertainty_beta
        for name, p in self.named_parameters():
            if p.grad is None or not p.requires_grad:
                continue
            now = (p * p.grad).detach().abs()
            mean, spread = self.importance.get(name, (torch.zeros_like(now), torch.zeros_like(now)))
            mean = b1 * mean + (1 - b1) * now
            self.importance[name] = mean, b2 * spread + (1 - b2) * (mean - now).abs()

    def score(self, c: int) -> float:
        """How much the loss leans on one subspace."""
        known = [self.importance.get(f"adamss_{m}.{c}") for m in "AB"]
        return sum(float((mean * spread).mean()) for mean, spread in filter(None, known))

    def limit(self, out: set[int]) -> None:
        """Have all subspaces but ``out`` train."""
        on = any(p.requires_grad for p in self.parameters())
        self.out_of_budget = frozenset(out)
        for name, p in self.named_parameters():
            p.requires_grad_(on and name not in self.fixed)
            if not p.requires_grad:
                p.grad = None

    @classmethod
    def after_step(cls, config: AdamssConfig, adapters: dict[str, Any], step: int) -> None:
        if not config.use_asa or step > config.final_warmup:
            return
        own = [x for a in adapters.values() for x in (a.each if isinstance(a, Stacked) else [a]) if isinstance(x, cls)]
        for adapter in own:
            adapter.observe(config)
        due = step > config.init_warmup and (step % config.mask_interval == 0 or step == config.final_warmup)
        if not due:
            return
        scores = [(a.score(c), i, c) for i, a in enumerate(own) for c in range(len(a.rows)) if c not in a.out_of_budget]
        total = sum(len(a.rows) for a in own)
        drop = sorted(scores)[: max(0, len(scores) - config.budget(step, total))]
        for i, adapter in enumerate(own):
            lost = {c for _, j, c in drop if j == i}
            if lost:
                adapter.limit(set(adapter.out_of_budget) | lost)


def sketch(w: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """U (out, r) and V (in, r) by a random sketch with two power iterations, the same for one seed."""
    with torch.random.fork_rng([w.device] if w.is_cuda else []):
        torch.manual_seed(seed)
        u, _, v = torch.svd_lowrank(w, q=min(r, *w.shape), niter=2)
    return u, v
