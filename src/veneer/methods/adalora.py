"""AdaLoRA: Adaptive Budget Allocation (Zhang, Chen, Bukharin et al., 2023, arXiv:2303.10512).

    W' = W + c P diag(E) Q        P (out, r), E (r, 1), Q (r, in), c = alpha / (r + 1e-5), r the starting rank

P and Q start at N(0, 0.02), E at zero, so the start is the base model. The loss gains gamma times the mean over all P
and Q of ||P^T P - I||_F and ||Q Q^T - I||_F. After each optimiser step every scalar w with gradient g has the
sensitivity I = |w g|, smoothed I~ = b1 I~ + (1 - b1) I, with the uncertainty U = b2 U + (1 - b2) |I - I~| and the
score s = I~ U; triplet i scores S_i = s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij). All layers' triplets compete for one
budget, which falls along a cubic from init_r to target_r a matrix; losers have E_i set to zero. Cost: as LoRA.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Stacked
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.lora_config import VARIANTS_BY_FIELD, LoraConfig
from veneer.methods.sides import Factored, input_dropout


@dataclass
class AdaLoraConfig(LoraConfig):
    """Settings of AdaLoRA: ``init_r`` and ``target_r`` take the place of ``r``.

    ``total_step`` counts optimiser steps and must be known. Where ``tinit`` and ``tfinal`` are both left at 0, pruning
    waits for the first tenth of them and leaves the last three tenths alone (at once and to the end, as zeros read
    literally, the budget would be settled before anything is learnt).

    Attributes:
        r: not used; see ``init_r``.
        rank_pattern: which triplets are left in each layer; written by training.
        target_r: mean rank of a layer at the end.
        init_r: rank of every layer at the start.
        tinit: steps before pruning begins.
        tfinal: last steps, in which the ranks stay.
        deltaT: steps between two prunings.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of its uncertainty.
        orth_reg_weight: weight of the orthogonality term in the loss.
        total_step: length of the training in optimiser steps.

    Raises:
        ValueError: at ``get_peft_model``: no ``total_step``, a schedule without a pruning phase, or an option of LoRA
            that has no meaning here.
    """

    rank_pattern: dict[str, Any] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    type: ClassVar[str | None] = "ADALORA"
    patterns: ClassVar[dict[str, str]] = {"alpha_pattern": "lora_alpha"}

    def check(self) -> None:
        """Refuse what cannot be honoured, before anything is planted."""
        for name in (*VARIANTS_BY_FIELD, "use_rslora", "lora_bias", "megatron_config"):
            if getattr(self, name):
                raise ValueError(f"AdaLoRA does not work with {name}={getattr(self, name)!r}; take it out.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"AdaLoRA has a start of its own, so init_lora_weights='{self.init_lora_weights}' has no place in it; "
                "leave it out."
            )
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(
                f"AdaLoRA needs total_step, the optimiser steps of the whole training, not {self.total_step}; "
                "its budget falls along a schedule."
            )
        for name in ("init_r", "target_r", "deltaT"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)}.")
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} is above init_r={self.init_r}; the budget can only fall.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}.")
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight must not be negative, but is {self.orth_reg_weight}.")
        if self.tinit < 0 or self.tfinal < 0 or self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} to prune "
                "in; lower them."
            )
        if self.r not in (8, self.init_r):
            warnings.warn(f"AdaLoRA does not read r={self.r}; set init_r and target_r.", stacklevel=2)

    @property
    def phases(self) -> tuple[int, int]:
        """(last step before pruning, step at which the pattern is settled)."""
        assert self.total_step is not None
        if self.tinit == 0 and self.tfinal == 0:
            return self.total_step // 10, self.total_step - 3 * self.total_step // 10
        return self.tinit, self.total_step - self.tfinal

    def budget(self, step: int, matrices: int) -> int:
        """How many triplets all matrices together may have at this step."""
        start, end = self.phases
        first, last = self.init_r * matrices, self.target_r * matrices
        if step <= start:
            return first
        if step >= end:
            return last
        return int(last + (first - last) * (1 - (step - start) / (end - start)) ** 3)


@method("ADALORA", AdaLoraConfig)
class AdaLora(Factored):
    """``P diag(E) Q`` under the names lora_B, lora_E, lora_A; pruned triplets keep their rows with E at zero."""

    dropout = "lora_dropout"

    def __init__(self, site: Site, config: AdaLoraConfig):
        super().__init__(site, config)
        self.weight_of_penalty = config.orth_reg_weight
        self.scaling = config.lora_alpha / (config.init_r + 1e-5)
        self.lora_dropout = input_dropout(site, config.lora_dropout, "lora_dropout")
        r = config.init_r
        self.lora_A = nn.Parameter(torch.randn(r, math.prod(site.shape[1:])))
        self.lora_E = nn.Parameter(torch.randn(r, 1))
        self.lora_B = nn.Parameter(torch.randn(site.out_features, r))
        if config.init_lora_weights is not False:
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)
            nn.init.zeros_(self.lora_E)
        self.kept: list[bool] | None = None
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def plan(cls, config: AdaLoraConfig, sites: Sequence[Site]) -> nn.Module:
        """How many matrices the mean of the regulariser runs over."""
        return _Count(2 * sum(site.stack or 1 for site in sites))

    # ---- the layer --------------------------------------------------------------------------------------------------
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A * (self.scaling * self.lora_E), self.lora_B

    def delta_factors(self) -> tuple[Tensor, Tensor] | None:
        groups = getattr(self.site, "groups", 1)
        if groups > 1:
            return None  # one pair for all groups, where the others count a pair for each
        down, up = self.factors()
        return (up[None], down[None]) if self.site.kernel else (up, down)

    def penalty(self) -> Tensor | None:
        if not self.weight_of_penalty:
            return None
        a, b = self.lora_A.float(), self.lora_B.float()
        one = torch.eye(a.shape[0], device=a.device)
        off = torch.linalg.norm(a @ a.T - one) + torch.linalg.norm(b.T @ b - one)
        return self.weight_of_penalty * off / self.shared.matrices  # type: ignore[union-attr]

    # ---- the budget -------------------------------------------------------------------------------------------------
    @classmethod
    @torch.no_grad()
    def after_step(cls, config: AdaLoraConfig, adapters: dict[str, Adapter], step: int) -> None:
        """Watch every layer's gradients, and prune all layers to the budget of this step."""
        each = dict(_each(adapters))
        start, end = config.phases
        settled = bool(config.rank_pattern)
        if step < end:
            for adapter in each.values():
                adapter._watch(config.beta1, config.beta2)
            if step > start and step % config.deltaT == 0:
                _prune(each, config.budget(step, len(each)))
        elif not settled:
            kept = _prune(each, config.budget(step, len(each)))
            config.rank_pattern = {f"{place}.lora_E": mask.tolist() for place, mask in kept.items()}
            for place, adapter in each.items():
                adapter.kept, adapter._seen = kept[place].tolist(), {}
        else:
            for adapter in each.values():
                if adapter.kept is not None:
                    adapter._zero(torch.tensor(adapter.kept))

    def _watch(self, beta1: float, beta2: float) -> None:
        for name, w in self.named_parameters():
            if w.grad is None:
                continue
            now = torch.nan_to_num((w * w.grad).float().abs(), nan=0.0, posinf=0.0, neginf=0.0)
            smooth, uncertain = self._seen.get(name) or (torch.zeros_like(now), torch.zeros_like(now))
            smooth = beta1 * smooth + (1 - beta1) * now
            uncertain = beta2 * uncertain + (1 - beta2) * (now - smooth).abs()
            self._seen[name] = smooth, uncertain

    def training_state(self) -> dict[str, Tensor]:
        names = ("smooth", "uncertain")
        return {f"{key}.{n}": t for key, both in self._seen.items() for n, t in zip(names, both, strict=True)}

    def resume(self, state: dict[str, Tensor]) -> None:
        keys = {key.rpartition(".")[0] for key in state if key.endswith(".smooth")}
        device = self.lora_E.device
        self._seen = {k: (state[f"{k}.smooth"].to(device), state[f"{k}.uncertain"].to(device)) for k in keys}

    def scores(self) -> Tensor:
        """S (r,), of what the gradients have shown so far."""
        zero = torch.zeros(self.lora_E.shape[0], device=self.lora_E.device)
        s = {name: smooth * uncertain for name, (smooth, uncertain) in self._seen.items()}
        e, a, b = s.get("lora_E"), s.get("lora_A"), s.get("lora_B")
        return (
            (zero if e is None else e[:, 0]) + (zero if a is None else a.mean(1)) + (zero if b is None else b.mean(0))
        )

    def _zero(self, kept: Tensor) -> None:
        self.lora_E.mul_(kept.to(self.lora_E.device).unsqueeze(1))

    # ---- the checkpoint: only what the budget left ------------------------------------------------------------------
    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.kept is None or all(self.kept):
            return tensors
        keep = torch.tensor(self.kept, device=self.lora_E.device)
        cut = {"lora_A": lambda t: t[keep], "lora_E": lambda t: t[keep], "lora_B": lambda t: t[:, keep]}
        return {key: cut[key](value) for key, value in tensors.items()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rank = tensors["lora_E"].shape[0] if "lora_E" in tensors else self.lora_E.shape[0]
        if rank != self.lora_E.shape[0]:
            for name, shape in (("lora_A", (rank, -1)), ("lora_E", (rank, -1)), ("lora_B", (-1, rank))):
                old = getattr(self, name)
                sizes = [have if want == -1 else want for have, want in zip(old.shape, shape, strict=True)]
                setattr(self, name, nn.Parameter(old.new_zeros(sizes), requires_grad=old.requires_grad))
            self.kept, self._seen = None, {}
        return tensors


class _Count(nn.Module):
    """The number of matrices that share one regulariser."""

    def __init__(self, matrices: int):
        super().__init__()
        self.matrices = matrices


def _each(adapters: dict[str, Adapter]) -> Any:
    """(place, adapter), the matrices of a stack one by one."""
    for place, adapter in adapters.items():
        if isinstance(adapter, AdaLora):
            yield place, adapter
        elif isinstance(adapter, Stacked):
            yield from ((f"{place}.each.{i}", one) for i, one in enumerate(adapter.each))


def _prune(each: dict[str, AdaLora], budget: int) -> dict[str, Tensor]:
    """Set E to zero for all but the ``budget`` best triplets of all layers; returns which were kept."""
    device = next(iter(each.values())).lora_E.device
    sizes = [adapter.lora_E.shape[0] for adapter in each.values()]
    scores = torch.cat([adapter.scores().to(device) for adapter in each.values()])
    best = torch.zeros_like(scores, dtype=torch.bool)
    best[scores.topk(min(budget, len(scores))).indices] = True
    kept = dict(zip(each, best.split(sizes), strict=True))
    for place, adapter in each.items():
        adapter._zero(kept[place])
    return kept
