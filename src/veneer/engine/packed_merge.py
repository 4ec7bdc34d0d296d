"""Merging into packed layers: the three ways, and what each costs, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

DEQUANTIZE, REQUANTIZE = "dequantize", "requantize"
Way = str | Mapping[str, Tensor]
"""What a packed layer becomes: dense, packed again, or the original weights (path -> (out, in)) plus the change."""


def chosen_way(quantized: Way | None) -> Way:
    """The way asked for, "dequantize" where none was.

    Raises:
        ValueError: an unknown word.
    """
    if quantized is None:
        return DEQUANTIZE
    if isinstance(quantized, str) and quantized not in (DEQUANTIZE, REQUANTIZE):
        raise ValueError(
            f"quantized must be '{DEQUANTIZE}', '{REQUANTIZE}', or the original weights by layer, not '{quantized}'."
        )
    return quantized


@dataclass(frozen=True)
class Loss:
    """How far a merged layer's weight is from the one that the adapted layer worked with.

    Attributes:
        error: the distance, relative to the weight.
        of_change: the distance, relative to what the adapters change: near 1 or above, little of them is left.
    """

    error: float
    of_change: float

    @classmethod
    def between(cls, found: Tensor, exact: Tensor, before: Tensor) -> Loss:
        """Measured on the weights: as merged, as the sum was, and as they were without the adapters."""
        off = float((found - exact).norm())
        weight, change = float(exact.norm()), float((exact - before).norm())
        return cls(off / max(weight, 1e-30), off / max(change, 1e-30))


@dataclass(frozen=True)
class MergeReport:
    """What a merge did at packed layers.

    Attributes:
        names: the adapters.
        way: what became of the layers.
        layers: path -> what it cost there.
    """

    names: tuple[str, ...]
    way: Way
    layers: dict[str, Loss]

    @property
    def error(self) -> float:
        """The mean relative error of a layer's weight."""
        return sum(loss.error for loss in self.layers.values()) / max(1, len(self.layers))

    @property
    def of_change(self) -> float:
        """The mean error relative to the adapters' change."""
        return sum(loss.of_change for loss in self.layers.values()) / max(1, len(self.layers))

    def __str__(self) -> str:
        if not self.layers:
            return f"Merged {', '.join(self.names)}; no layer was packed."
        did = {
            DEQUANTIZE: "made dense, which is what the adapters were trained on",
            REQUANTIZE: "packed again, which rounds the sum to the nearest packed values",
        }.get(self.way if isinstance(self.way, str) else "", "replaced by the original weights plus the change")
        worst = max(self.layers, key=lambda path: self.layers[path].of_change)
        return (
            f"Merged {', '.join(self.names)} into {len(self.layers)} quantised layers, {did}: the weights differ from "
            f"those of the adapted model by {self.error:.2%}, which is {self.of_change:.2%} of what the adapters "
            f"change (at most {self.layers[worst].of_change:.2%}, at '{worst}'). Other ways: "
            f"quantized='{DEQUANTIZE}', '{REQUANTIZE}', or the original weights."
        )
