"""AdapterFusion (Pfeiffer, Kamath, Rueckle, Cho, Gurevych, 2021, arXiv:2005.00247).

    y = h + sum_i w_i V z_i        w = softmax_i((Q h) . (K z_i) / T),  z_i = U_i f(D_i h)        Q, K, V (dim, dim)

Two stages: bottleneck adapters are trained each on its own task and saved; then ``adapters`` names their folders, they
are taken in frozen, and only Q, K and V learn how to mix them, token by token, on a target task. V starts as the
identity (1e-6 elsewhere), Q and K at N(0, 0.02); T falls from 50 to 1 over training if ``temperature_steps`` is set. V
is drawn to the identity by ``regularization`` ||V - I||^2 in the loss. The file holds the bottlenecks too. Cost: 3
dim^2 a token and place for h, and as much for each z_i.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.config import LayerConfig, PeftConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.bottleneck import Bottleneck, BottleneckConfig, Inserted, widths


@dataclass
class FusionConfig(LayerConfig):
    """Settings of AdapterFusion.

    Attributes:
        adapters: folders of bottleneck adapters, all after (or all beside) the same modules.
        bottlenecks: their settings; filled in.
        temperature_steps: optimiser steps over which T falls from 50 to 1; 0: T is 1 always.
        regularization: how strongly V is drawn to the identity.

    Raises:
        ValueError: at ``get_peft_model``: no adapters, or folders that hold something else.
    """

    adapters: list[str] | None = None
    bottlenecks: list[dict[str, Any]] | None = None
    temperature_steps: int = 0
    regularization: float = 0.01

    type: ClassVar[str | None] = "FUSION"

    def places(self, model_type: str | None) -> Any:
        """Where the adapters are that it fuses."""
        self._read()
        said = self.each()[0].target_modules
        return list(said) if isinstance(said, set) else said

    def each(self) -> list[BottleneckConfig]:
        """The settings of the fused adapters."""
        known = {f.name for f in fields(BottleneckConfig)} - {"peft_type"}
        return [BottleneckConfig(**{k: v for k, v in one.items() if k in known}) for one in self.bottlenecks or []]

    def _read(self) -> None:
        if self.bottlenecks is not None:
            return
        if not self.adapters:
            raise ValueError("AdapterFusion needs adapters: the folders of two or more trained bottleneck adapters.")
        found = [PeftConfig.read(folder) for folder in self.adapters]
        for folder, config in zip(self.adapters, found):
            if not isinstance(config, BottleneckConfig) or config.reads != "output":
                raise ValueError(f"{folder} holds a {config.peft_type} adapter; AdapterFusion mixes plain bottlenecks.")
        self.bottlenecks = [config.file_dict() for config in found]

    def check(self) -> None:
        """Read the adapters' settings, which must be of one kind."""
        self._read()
        if len({one.placement == "parallel" for one in self.each()}) > 1:
            raise ValueError("AdapterFusion cannot mix adapters after modules with adapters beside them.")
        if self.temperature_steps < 0 or self.regularization < 0:
            raise ValueError("temperature_steps and regularization must not be negative.")


@method("FUSION", FusionConfig)
class Fusion(Inserted):
    """Frozen bottlenecks and the attention that mixes them."""

    def __init__(self, site: Site, config: FusionConfig):
        super().__init__(site, config)
        each = config.each()
        self.parallel = each[0].placement == "parallel"
        self.each = nn.ModuleList(Bottleneck(site, one) for one in each)
        if not config.from_file:
            for one, folder in zip(self.each, config.adapters or []):
                one.load_state_dict(_tensors(folder, site.path))
        read, given = widths(site)
        query = read if self.parallel else given
        self.fusion_query, self.fusion_key = nn.Linear(query, given), nn.Linear(given, given)
        self.fusion_value = nn.Linear(given, given, bias=False)
        for layer in (self.fusion_query, self.fusion_key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.fusion_value.weight, 1e-6)
        with torch.no_grad():
            self.fusion_value.weight.fill_diagonal_(1.0)
        self.fixed = frozenset(f"each.{name}" for name, _ in self.each.named_parameters())
        self.strength = config.regularization
        self.register_buffer("temperature", torch.tensor(50.0 if config.temperature_steps else 1.0))

    def added(self, h: Tensor) -> Tensor:
        z = torch.stack([one.added(h) for one in self.each], -2)  # (..., n, dim)
        scores = (self.fusion_query(h)[..., None, :] * self.fusion_key(z)).sum(-1) / self.temperature
        return (scores.softmax(-1)[..., None] * self.fusion_value(z)).sum(-2)

    def penalty(self) -> Tensor | None:
        if not self.strength:
            return None
        V = self.fusion_value.weight
        return self.strength * (V - torch.eye(len(V), device=V.device, dtype=V.dtype)).square().sum()

    @classmethod
    def after_step(cls, config: Any, adapters: dict[str, Adapter], step: int) -> None:
        if config.temperature_steps:
            now = max(1.0, 50.0 - 49.0 * step / config.temperature_steps)
            for adapter in adapters.values():
                adapter.temperature.fill_(now)  # type: ignore[operator, union-attr]


def _tensors(folder: str | Path, path: str) -> dict[str, Tensor]:
    """One place's tensors of a saved bottleneck adapter.

    Raises:
        ValueError: it has none there.
    """
    beginning = f"base_model.model.{path}."
    found = load_file(Path(folder) / "adapter_model.safetensors")
    own = {k.removeprefix(beginning): v for k, v in found.items() if k.startswith(beginning)}
    if not own:
        raise ValueError(f"{folder} has no bottleneck at '{path}'; fuse adapters that sit at the same modules.")
    return own
