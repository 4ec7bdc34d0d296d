"""(IA)^3: Infused Adapter by Inhibiting and Amplifying Inner Activations (Liu et al., 2022, arXiv:2205.05638).

    y = l * (W x + b)       l (out,)        for keys and values: the bias is scaled as well
    y = W (l * x) + b       l (in,)         for ``feedforward_modules``

l starts at 1; several adapters multiply. Cost: one product per feature and token, against 2 in out of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base, Weight
from veneer.core.config import LayerConfig, newer
from veneer.core.patterns import ends_with, fullmatch
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import along


@dataclass
class IA3Config(LayerConfig):
    """Settings of (IA)^3: ``feedforward_modules`` names the targets whose input is scaled.

    Attributes:
        feedforward_modules: those of the targets whose input is scaled, not their output.
        init_ia3_weights: True starts as the base model, False at random values.

    Raises:
        ValueError: ``feedforward_modules`` names what ``target_modules`` does not.
    """

    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True
    layers_to_transform: list[int] | int | None = newer()

    type: ClassVar[str | None] = "IA3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, list | tuple):
            self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            extra = sorted(self.feedforward_modules - self.target_modules)
            if extra:
                raise ValueError(f"feedforward_modules should be a subset of target_modules, but adds {extra}.")

    def feeds(self, path: str) -> bool:
        """Whether the layer at ``path`` is scaled on its input."""
        names = self.feedforward_modules or ()
        if isinstance(names, str):
            return fullmatch(names, path)
        return any(ends_with(path, name) for name in names)


@method("IA3", IA3Config)
class IA3(Adapter):
    """One factor for each feature of a layer's output, or of its input."""

    def __init__(self, site: Site, config: IA3Config):
        super().__init__(site, config)
        self.on_input = config.feeds(site.path)
        n = site.in_features * getattr(site, "groups", 1) if self.on_input else site.out_features
        shape = (1, n, *[1] * len(site.kernel)) if site.kernel else (1, n) if self.on_input else (n, 1)
        self.ia3_l = nn.Parameter(torch.ones(shape) if config.init_ia3_weights else torch.randn(shape))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        l = self.ia3_l.flatten()  # noqa: E741 - the paper's letter
        if self.on_input and x.is_floating_point():
            return base((x.to(l.dtype) * along(self.site, l)).to(x.dtype))
        y = base(x)
        l = l[x].unsqueeze(-1) if self.on_input else along(self.site, l)  # noqa: E741
        return (y.to(l.dtype) * l).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        l = self.ia3_l.flatten().to(weight)  # noqa: E741
        if not self.on_input:
            return weight * l.view(-1, *[1] * (weight.dim() - 1)), None if bias is None else bias * l
        groups = getattr(self.site, "groups", 1)
        each = l.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)  # (out, in / groups)
        return weight * each.view(*each.shape, *[1] * (weight.dim() - 2)), bias
