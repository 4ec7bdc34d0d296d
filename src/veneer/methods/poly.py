"""Poly: Combining Modular Skills in Multitask Learning (Ponti et al., 2022, arXiv:2202.13914); MHR (arXiv:2211.03831).

    y = W x + (1 / r) B_t A_t x
    A_t[split] = sum_s z_t[split, s] A[split, s]       A (splits, skills, in / splits, r)
    B_t[split] = sum_s z_t[split, s] B[split, s]       B (splits, skills, r, out / splits)
    z_t: sigmoid of a task's logits, normalised over the skills; in training a relaxed Bernoulli sample (temperature 1)

One split is Poly; several are multi-head routing. B starts at zero, so the start is the base model. Cost per token
beside the base layer: 2 r (in + out) FLOPs, and 2 skills r (in + out) per row of the batch to mix the skills.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

from veneer.core.adapter import Adapter, Base, Weight
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import added_by_row


@dataclass
class PolyConfig(LayerConfig):
    """Settings of Poly and MHR; a batch names its tasks with ``task_ids`` (batch,).

    Attributes:
        r: rank of each skill.
        poly_type: "poly", the only one.
        n_tasks: number of tasks.
        n_skills: number of skills that they share.
        n_splits: parts of a layer that choose apart; 1 is Poly, more are MHR.
        init_weights: True starts as the base model, False at random values.
    """

    r: int = 8
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1
    init_weights: bool = True

    type: ClassVar[str | None] = "POLY"

    def check(self) -> None:
        """Refuse sizes that are not positive and unknown types."""
        if self.poly_type != "poly":
            raise ValueError(f"poly_type must be 'poly', not '{self.poly_type}'.")
        if min(self.r, self.n_tasks, self.n_skills, self.n_splits) < 1:
            raise ValueError("PolyConfig's r, n_tasks, n_skills and n_splits must all be positive.")


class Router(nn.Module):
    """Logits of each task over (split, skill)."""

    def __init__(self, config: PolyConfig):
        super().__init__()
        self.shape = (config.n_splits, config.n_skills)
        logits = torch.empty(config.n_tasks, config.n_splits * config.n_skills)
        self.module_logits = nn.Parameter(logits.uniform_(-1e-3, 1e-3))

    def forward(self, tasks: Tensor, sample: bool) -> Tensor:
        """(rows,) task numbers -> (rows, splits, skills), summing to 1 over the skills."""
        logits = self.module_logits[tasks].unflatten(-1, self.shape)
        z = RelaxedBernoulli(1.0, logits=logits).rsample() if sample else logits.sigmoid()
        return z / (z.sum(-1, keepdim=True) + 1e-12)


@method("POLY", PolyConfig)
class Poly(Adapter):
    """An inventory of low-rank skills, mixed for each row's task."""

    wants = frozenset({"task_ids"})

    def __init__(self, site: Site, config: PolyConfig):
        super().__init__(site, config)
        site.need_linear("Poly mixes skills by row of")
        splits, skills, r = config.n_splits, config.n_skills, config.r
        if site.in_features % splits or site.out_features % splits:
            raise ValueError(
                f"n_splits={splits} does not divide '{site.path}' ({site.in_features} -> {site.out_features}); "
                "choose a divisor of both."
            )
        self.r, self.tasks = r, config.n_tasks
        self.poly_lora_A = nn.Parameter(torch.empty(splits, skills, site.in_features // splits, r))
        self.poly_lora_B = nn.Parameter(torch.zeros(splits, skills, r, site.out_features // splits))
        self.poly_router = Router(config)
        self.routed: Tensor | None = None
        bound = math.sqrt(1 / site.in_features)
        nn.init.uniform_(self.poly_lora_A, -bound, bound)
        if not config.init_weights:
            nn.init.uniform_(self.poly_lora_B, -bound, bound)

    def factors(self, tasks: Tensor, sample: bool = False) -> tuple[Tensor, Tensor]:
        """A_t (rows, in, r) and B_t / r (rows, r, out) of the given tasks."""
        z = self.poly_router(tasks, sample)  # (rows, splits, skills)
        self.routed = z.mean(1) if self.training else None
        a = torch.einsum("bqs,qsdr->bqdr", z, self.poly_lora_A).flatten(1, 2)
        return a, torch.einsum("bqs,qsrd->brqd", z / self.r, self.poly_lora_B).flatten(2, 3)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        a, b = self.factors(self._tasks(x), sample=self.training)
        h = x.to(a.dtype)
        h = (h.unsqueeze(1) if x.dim() == 2 else h.flatten(1, -2)) @ a
        return added_by_row(y, h, b)

    def _tasks(self, x: Tensor) -> Tensor:
        given: Any = self.site.inputs.get("task_ids")
        if given is None:
            if self.tasks > 1:
                raise ValueError(
                    f"This adapter knows {self.tasks} tasks; pass task_ids, one number for each row of the batch."
                )
            return torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        times, rest = divmod(x.shape[0], given.shape[0])
        if rest or not times:
            raise ValueError(
                f"task_ids has {given.shape[0]} entries, but a layer was called with a batch of {x.shape[0]}; give one "
                "number for each row."
            )
        return given.to(x.device).repeat_interleave(times)

    @property
    def mergeable(self) -> bool:
        return self.tasks == 1

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        if self.tasks > 1:
            raise ValueError(
                f"Poly at '{self.site.path}' depends on the task; {self.tasks} tasks cannot be merged into one weight."
            )
        a, b = self.factors(torch.zeros(1, dtype=torch.long, device=weight.device))
        return weight + (a[0] @ b[0]).T.to(weight), bias
