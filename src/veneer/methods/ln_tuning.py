"""LN tuning: Tuning LayerNorm in Attention (Zhao et al., 2023, arXiv:2312.11420).

    y = g' * (x - mean) / std + b'          g', b' starting as copies of the layer's own

Trained copies of all parameters of each target, norm layers by default, stand in for its own. Cost: none beside the
layer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site


@dataclass
class LNTuningConfig(LayerConfig):
    """Settings of LN tuning."""

    exclude_modules: list[str] | set[str] | str | None = None

    type: ClassVar[str | None] = "LN_TUNING"

    def check(self) -> None:
        """Refuse targets that are not modules."""
        if self.target_parameters:
            raise ValueError("LN tuning trains whole modules; name them in target_modules, not in target_parameters.")


@method("LN_TUNING", LNTuningConfig)
class LNTuning(Adapter):
    """Trained copies of a module's parameters."""

    keeps_dtype = True
    whole_modules = True

    def __init__(self, site: Site, config: Any):
        super().__init__(site, config)
        own = dict(site.module.named_parameters())
        if not own:
            raise ValueError(
                f"LN tuning trains a module's parameters, but '{site.path}' ({type(site.module).__name__}) has none; "
                "put it into exclude_modules."
            )
        if not all(p.is_floating_point() for p in own.values()):
            raise ValueError(
                f"LN tuning cannot train the packed weight of '{site.path}' ({type(site.module).__name__}); name norm "
                "layers, or use LoRA there."
            )
        copies = {name.replace(".", "__"): nn.Parameter(p.detach().clone()) for name, p in own.items()}
        self.ln_tuning_layers = nn.ParameterDict(copies)

    def overrides(self) -> dict[str, Tensor]:
        return {name.replace("__", "."): value for name, value in self.ln_tuning_layers.items()}

    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("__", "."): value for key, value in tensors.items()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        split = {key: key.partition(".") for key in tensors}
        return {f"{first}.{name.replace('.', '__')}": tensors[key] for key, (first, _, name) in split.items()}
