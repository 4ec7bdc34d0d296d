"""Super-Tuning and Supra: train the entries of largest magnitude (2026, arXiv:2607.09287).

    W' = W + S (+ s B A)        S zero but for the (1 - sparsity) share of entries where |W| is largest; s = alpha / r

The values start at zero. With ``r`` a LoRA is added (Supra). ``select_top=False`` takes the smallest entries. The
places are in the file, or with ``save_precomputed_indices=False`` found again from the base model. Cost: 2 N in out
FLOPs to apply S to N tokens, and LoRA's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.entries import Entries
from veneer.methods.sides import columns, factored, input_dropout


@dataclass
class SupertuningConfig(LayerConfig):
    """Settings of Super-Tuning; ``lora_alpha`` defaults to 2 r.

    Attributes:
        sparsity: share of the entries that stay frozen.
        select_top: the largest entries; False takes the smallest.
        r: rank of the added LoRA (Supra); None: none.
        lora_alpha: its alpha; None: 2 r.
        lora_dropout: dropout on what the change reads, in training.
        init_weights: True starts as the base model, False at random values.
        save_precomputed_indices: keep the places in the file; False finds them again.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    type: ClassVar[str | None] = "SUPERTUNING"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), not {self.sparsity}.")
        if self.r is not None and self.r <= 0:
            raise ValueError(f"r must be a positive integer or None, not {self.r}.")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError("lora_alpha scales the added LoRA, which needs r to be set as well.")


@method("SUPERTUNING", SupertuningConfig)
class Supertuning(Entries):
    """Trained entries where the weight is largest, and perhaps a LoRA."""

    def __init__(self, site: Site, config: SupertuningConfig):
        super().__init__(site, config)
        self.size = max(1, int((1 - config.sparsity) * site.out_features * columns(site)))
        self.largest = config.select_top
        start = torch.zeros(self.size) if config.init_weights else 0.01 * torch.randn(self.size)
        self.supertuning_values = nn.Parameter(start)
        self.register_buffer("supertuning_indices", self.found(), persistent=config.save_precomputed_indices)
        self.r = config.r
        self.lora_dropout = input_dropout(site, config.lora_dropout, "lora_dropout")
        if config.r is not None:
            self.scaling = (2 * config.r if config.lora_alpha is None else config.lora_alpha) / config.r
            self.supertuning_lora_A = nn.Linear(columns(site), config.r, bias=False)
            self.supertuning_lora_B = nn.Linear(config.r, site.out_features, bias=False)
            nn.init.kaiming_uniform_(self.supertuning_lora_A.weight, a=math.sqrt(5))
            if config.init_weights:
                nn.init.zeros_(self.supertuning_lora_B.weight)

    def found(self) -> Tensor:
        """The flat places of the entries, by falling magnitude."""
        return self.site.weight.detach().abs().flatten().topk(self.size, largest=self.largest).indices.int()

    def ready(self) -> None:
        if self.supertuning_indices.is_meta and not self.supertuning_values.is_meta:
            self.supertuning_indices = self.found().to(self.supertuning_values.device)

    @property
    def places(self) -> Tensor:  # type: ignore[override]
        width = columns(self.site)
        return torch.stack([self.supertuning_indices // width, self.supertuning_indices % width])

    def values(self) -> Tensor:
        return self.supertuning_values

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r), scale included."""
        return self.supertuning_lora_A.weight, self.scaling * self.supertuning_lora_B.weight

    def delta(self, x: Tensor) -> Tensor:
        return self.with_lora(super().delta(x), x)

    def summed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.with_lora(super().summed(x, weight, bias), x)

    def with_lora(self, y: Tensor, x: Tensor) -> Tensor:
        """What the entries make of ``x``, and what the LoRA adds, if any."""
        if self.r is None:
            return y
        return y + factored(self.site, self.lora_dropout(x) if x.is_floating_point() else x, *self.factors())

    def delta_weight(self) -> Tensor:
        change = super().delta_weight()
        if self.r is None:
            return change
        a, b = self.factors()
        return change + (b @ a).reshape(self.site.shape)
