"""FourierFT: fine-tuning in the Fourier domain (Gao et al., 2024, arXiv:2405.03003).

    W' = W + s Re(ifft2(F))        F (out, in) zero but for n trained entries at random places

The places are drawn from ``random_loc_seed``, so equal for all layers of one shape, and are in no file. The default
start is N(0, 1), which is not the base model; ``init_weights=True`` starts at zero. Cost of a training step over the
frozen layer's 4 N in out FLOPs for N tokens: O((in out + N (in + out)) log) for the transforms of the change and of
both sides of its gradient, and 4 N n for the entries; in eval the sum is built once and kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig, newer
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.entries import Entries
from veneer.methods.sides import columns
from veneer.ops.spectra import at_frequencies, real_part


@dataclass
class FourierFTConfig(LayerConfig):
    """Settings of FourierFT.

    Attributes:
        n_frequency: number of trained entries a layer.
        scaling: s.
        random_loc_seed: seed of the places.
        n_frequency_pattern: name or regex of layers: their own number.
        init_weights: True starts at zero, which is the base; False at N(0, 1).
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] | None = newer({})
    init_weights: bool = False

    type: ClassVar[str | None] = "FOURIERFT"
    patterns: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        check_places(self)


def check_places(config: LayerConfig) -> None:
    """Refuse settings that name no place, or places that no seed can bring back."""
    for n in (config.n_frequency, *(config.n_frequency_pattern or {}).values()):
        if n <= 0:
            raise ValueError(f"n_frequency must be a positive integer, not {n}.")
    if config.random_loc_seed is None:
        raise ValueError(
            "random_loc_seed=None draws places that no file holds, so the adapter could not be loaded again; set a "
            "number."
        )


def places(rows: int, width: int, n: int, seed: int, path: str) -> Tensor:
    """n different places of a (rows, width) matrix, as (2, n) row and column numbers: the peer's draws.

    Raises:
        ValueError: there are fewer than n.
    """
    if n > rows * width:
        raise ValueError(
            f"n_frequency={n} is more than the {rows * width} entries of the weight of '{path}'; lower it, or give "
            "this layer a number of its own in n_frequency_pattern."
        )
    flat = torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack([flat // width, flat % width])


class Spectral(Entries):
    """A change given by n trained entries of a transform, at places that a seed decides."""

    spectrum: ClassVar[str]
    again = False

    def __init__(self, site: Site, n: int, scaling: float, seed: int, start: Tensor):
        super().__init__(site, None)
        self.scaling, self.seed, self.n = scaling, seed, n
        self.register_parameter(self.spectrum, nn.Parameter(start))
        self.register_buffer("places", self.draw().int(), persistent=False)

    def draw(self) -> Tensor:
        return places(self.site.out_features, columns(self.site), self.n, self.seed, self.site.path)

    def ready(self) -> None:
        trained = self.values()
        if self.places.is_meta and not trained.is_meta:
            self.places = self.draw().int().to(trained.device)

    def values(self) -> Tensor:
        return getattr(self, self.spectrum)


@method("FOURIERFT", FourierFTConfig)
class FourierFT(Spectral):
    """A sparse spectrum, transformed back."""

    spectrum = "fourierft_spectrum"
    zero_start = False

    def __init__(self, site: Site, config: FourierFTConfig):
        n = config.n_frequency
        start = torch.zeros(n) if config.init_weights else torch.randn(n)
        super().__init__(site, n, config.scaling, config.random_loc_seed, start)

    def matrix(self, values: Tensor) -> Tensor:
        wide = values.to(torch.promote_types(values.dtype, torch.float32))  # no transform in half precision
        shape = self.site.out_features, columns(self.site)
        return real_part(self.scaling * wide, self.places.long(), shape).to(values.dtype)

    def gradient(self, g: Tensor, x: Tensor) -> Tensor:
        return self.scaling * at_frequencies(g, x, self.places.long())
