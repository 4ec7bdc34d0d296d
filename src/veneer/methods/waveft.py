"""WaveFT: sparse fine-tuning in the wavelet domain (Bilican et al., 2025, arXiv:2505.12532).

    W' = W + s IDWT2(C)        C (out, in) zero but for n trained entries at random places

One level of the inverse transform: C, held between borders of half a filter, is read as four quadrants (averages,
and details along either axis). ``use_idwt=False`` takes C itself as the change. The places are drawn from
``random_loc_seed`` and are in no file. Cost of a training step over the frozen layer's 4 N in out FLOPs for N tokens:
2 L (in out + N (in + out)) for filters of length L, on the change and on both sides of its gradient, and 2 N n for the
entries; in eval the sum is built once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.config import LayerConfig, newer
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.fourierft import Spectral, check_places
from veneer.methods.sides import columns
from veneer.ops.entries import at_entries, turned
from veneer.ops.wavelets import analysed, crossed, filters, inverse


@dataclass
class WaveFTConfig(LayerConfig):
    """Settings of WaveFT. ``proportional_parameters`` shares n among the layers by their size.

    Attributes:
        n_frequency: number of trained entries a layer.
        scaling: s.
        wavelet_family: the filters; any of PyWavelets' discrete families.
        use_idwt: False takes C itself as the change.
        random_loc_seed: seed of the places.
        n_frequency_pattern: name or regex of layers: their own number.
        proportional_parameters: share the entries among the layers by their size.
        init_weights: True starts as the base model, False at random values.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] | None = newer({})
    proportional_parameters: bool = False
    init_weights: bool = True

    type: ClassVar[str | None] = "WAVEFT"
    patterns: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        check_places(self)
        if self.use_idwt:
            filters(self.wavelet_family)


class Shares(nn.Module):
    """The total number of entries and of weights, by which layers get their part."""

    def __init__(self, config: WaveFTConfig, sites: Sequence[Site]):
        super().__init__()
        each = [s for site in sites for s in ([site.one(i) for i in range(site.stack)] if site.stack else [site])]
        self.weights = sum(s.out_features * columns(s) for s in each)
        self.entries = config.n_frequency * len(each)

    def of(self, site: Site) -> int:
        return max(1, round(self.entries * site.out_features * columns(site) / self.weights))


@method("WAVEFT", WaveFTConfig)
class WaveFT(Spectral):
    """Sparse wavelet coefficients, transformed back."""

    spectrum = "waveft_spectrum"
    takes_shared = True

    @classmethod
    def plan(cls, config: WaveFTConfig, sites: Sequence[Site]) -> Shares:
        return Shares(config, sites)

    def __init__(self, site: Site, config: WaveFTConfig, shared: Shares):
        n = shared.of(site) if config.proportional_parameters else config.n_frequency
        start = torch.zeros(n) if config.init_weights else 0.01 * torch.randn(n)
        super().__init__(site, n, config.scaling, config.random_loc_seed, start)
        self.filters = filters(config.wavelet_family) if config.use_idwt else None

    def matrix(self, values: Tensor) -> Tensor:
        c = self.entries(self.scaling * values)
        if self.filters is None:
            return c
        rows, width = c.shape
        border = self.border
        c = F.pad(c, (border, border + width % 2, border, border + rows % 2))
        return inverse(c, self.filters)[:rows, :width]

    def gradient(self, g: Tensor, x: Tensor) -> Tensor:
        if self.filters is None:
            return self.scaling * super().gradient(g, x)
        rows, columns = self.places.long() + self.border
        g, x = analysed(turned(g), self.filters), analysed(turned(x), self.filters)
        rows, columns = crossed(rows, columns, len(g), len(x))
        return self.scaling * at_entries(g, x, rows, columns)

    @property
    def border(self) -> int:
        """Half a filter, around C."""
        return len(self.filters[0]) // 2 - 1
