"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (Ben Zaken et al., 2021,
arXiv:2106.10199).

    y = W x + b'        b' (out,), starting at the layer's own b

The layers' existing biases train and nothing else. Any method can add this with ``bias="all"``; layers without a bias
are for BEFT. Cost: none beside the layer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from veneer.core.adapter import Adapter
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.bias import Bias, bias_names


@dataclass
class BitFitConfig(LayerConfig):
    """Settings of BitFit: ``target_modules`` are layers (norms too) whose biases train; default: all linear layers."""

    type: ClassVar[str | None] = "BITFIT"

    def __post_init__(self) -> None:
        if self.target_modules is None and not self.target_parameters:
            self.target_modules = "all-linear"
        super().__post_init__()

    def check(self) -> None:
        """Refuse targets that are not modules."""
        if self.target_parameters:
            raise ValueError("BitFit trains the biases of whole modules; name them in target_modules.")
        if self.bias != "none":
            raise ValueError(f"BitFit is about biases already; bias='{self.bias}' would train them twice.")


@method("BITFIT", BitFitConfig)
class BitFit(Bias):
    """A layer's bias vectors, trained."""

    @classmethod
    def on(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Adapter:
        if not bias_names(site.module):
            raise ValueError(
                f"BitFit trains existing biases, but '{site.path}' ({type(site.module).__name__}) has none; put it "
                "into exclude_modules, or use BEFT, which adds biases."
            )
        return cls(site, config)
