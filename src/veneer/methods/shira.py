"""SHiRA: Sparse High Rank Adapters (Bhardwaj et al., 2024, arXiv:2406.13175).

    W' = W + S        S zero but for r (in + out) trained entries at fixed random places

As many trained numbers as a LoRA of rank r, with no bound on the rank. The values start at zero; the places are in the
file. Cost: a training step's gradient is 2 N FLOPs an entry for N tokens, or, for many entries, 2 N in out for all of
W's; in eval the sum is built once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.entries import Entries
from veneer.methods.sides import columns

Mask = Callable[..., Tensor]
"""``(layer, r, **kwargs) -> mask`` shaped like the layer's weight, not zero where an entry is to train."""


@dataclass
class ShiraConfig(LayerConfig):
    """Settings of SHiRA. For another ``mask_type`` than "random", set the attribute ``mask_fn`` (no file holds it).

    Attributes:
        r: trains r (in + out) entries a layer.
        mask_type: "random", or another word where ``mask_fn`` is set.
        random_seed: seed of the places.
        init_weights: True starts at zero, False at random values.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True

    type: ClassVar[str | None] = "SHIRA"
    mask_fn: ClassVar[Mask | None] = None

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")
        if self.mask_type != "random" and self.mask_fn is None and not self.inference_mode:
            raise ValueError(
                f"mask_type='{self.mask_type}' is not built in; set config.mask_fn to a function "
                "(layer, r, **kwargs) -> mask."
            )


@method("SHIRA", ShiraConfig)
class Shira(Entries):
    """Trained entries at random places."""

    def __init__(self, site: Site, config: ShiraConfig):
        super().__init__(site, config)
        rows, width = site.out_features, columns(site)
        n = config.r * (rows + width)
        if n > rows * width:
            raise ValueError(
                f"SHiRA with r={config.r} trains {n} entries, but the weight of '{site.path}' has only "
                f"{rows * width}; lower r."
            )
        flat = self.drawn(site, config, n) if config.mask_type == "random" or config.mask_fn is None else None
        if flat is None:
            mask = config.mask_fn(site.module, config.r, random_seed=config.random_seed)
            mask = mask.T if getattr(site, "turned", False) or site.kind == "embedding" else mask
            flat = mask.flatten().nonzero().flatten()
        self.register_buffer("shira_indices", torch.stack([flat // width, flat % width]).int())
        self.shira_weight = nn.Parameter((torch.zeros if config.init_weights else torch.randn)(len(flat)))

    @staticmethod
    def drawn(site: Site, config: Any, n: int) -> Tensor:
        """n different entries: the peer's draws."""
        generator = None if config.random_seed is None else torch.Generator().manual_seed(config.random_seed)
        return torch.randperm(site.out_features * columns(site), generator=generator)[:n].sort().values

    @property
    def places(self) -> Tensor:  # type: ignore[override]
        return self.shira_indices

    def values(self) -> Tensor:
        return self.shira_weight

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = tensors.get("shira_weight")
        if found is not None and found.shape != self.shira_weight.shape:  # a mask of the user's own making
            self.shira_weight = nn.Parameter(self.shira_weight.new_zeros(found.shape), self.shira_weight.requires_grad)
            self.shira_indices = self.shira_indices.new_zeros(2, len(found))
        return tensors
