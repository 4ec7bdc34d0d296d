"""C3A: Circular Convolution Adaptation (Chen et al., 2024, arXiv:2407.19342).

    W' = W + D        D in blocks of b x b, D_ij[r, c] = w_ij[(c - r) mod b] / in,   w (out/b, in/b, b)

Each block is a circular correlation, applied through the FFT: O(N (in + out) log b) + 4 N in out / b FLOPs for N
tokens, against 2 N in out of the layer. A training step adds four such transforms (layers that read the same x share
its own) and three such products: for b = 64 only 0.05 of the frozen layer's FLOPs, but 22 readings or writings of what
has the size of x or y, 8 of them between the orders that transforms and products want; those are the floor here. In
eval the sum is kept: one more weight. The default start is Xavier-uniform, which is not the base model;
``init_weights=True`` starts at zero. Several active adapters add up, all reading the layer's own input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Additive
from veneer.core.config import LayerConfig, newer
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import columns
from veneer.ops.circulant import correlated

STARTS = (True, False, "xavier_uniform", "kaiming_uniform", "gaussian")


@dataclass
class C3AConfig(LayerConfig):
    """Settings of C3A. ``init_weights``: True (zeros), "xavier_uniform" (also False), "kaiming_uniform", "gaussian".

    Attributes:
        block_size: size b of the circulant blocks; must divide a layer's sides.
        block_size_pattern: name or regex of layers: their own block size.
        init_weights: True (zeros), "xavier_uniform" (also False), "kaiming_uniform" or "gaussian".
    """

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = newer({})
    init_weights: bool | str | None = "xavier_uniform"

    type: ClassVar[str | None] = "C3A"
    patterns: ClassVar[dict[str, str]] = {"block_size_pattern": "block_size"}

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.init_weights is not None and self.init_weights not in STARTS:
            raise ValueError(f"init_weights must be one of {', '.join(map(str, STARTS))}, not '{self.init_weights}'.")
        for b in (self.block_size, *(self.block_size_pattern or {}).values()):
            if b <= 0:
                raise ValueError(f"block_size must be a positive integer, not {b}.")


@method("C3A", C3AConfig)
class C3A(Additive):
    """A block-circulant change."""

    zero_start = False

    def __init__(self, site: Site, config: C3AConfig):
        super().__init__(site, config)
        b, width = config.block_size, columns(site)
        for what, size in (("inputs", width), ("outputs", site.out_features)):
            if size % b:
                raise ValueError(
                    f"C3A cuts the {size} {what} of '{site.path}' into blocks of {b}, which does not divide them; "
                    f"choose a block_size that divides {math.gcd(width, site.out_features)}, or name one for this "
                    "layer in block_size_pattern."
                )
        self.b, self.width = b, width
        kernel = torch.zeros(site.out_features // b, width // b, b)
        if config.init_weights == "gaussian":
            nn.init.normal_(kernel)
        elif config.init_weights == "kaiming_uniform":
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        elif config.init_weights is not True:
            nn.init.xavier_uniform_(kernel)
        self.c3a_kernel = nn.Parameter(kernel)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        """The transforms are for training; the sum of weight and change is what decodes fastest."""
        return not (self.training or torch.is_grad_enabled())

    def delta(self, x: Tensor) -> Tensor:
        if self.site.kernel or self.site.kind == "embedding":
            return super().delta(x)
        wide = torch.promote_types(x.dtype, torch.float32)  # no transform in half precision
        return correlated(x.to(wide), self.c3a_kernel, 1 / self.width).to(x.dtype)

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        change = self.change(x)
        return change.add_(y) if change.dtype is y.dtype else y + change.to(y.dtype)

    def delta_weight(self) -> Tensor:
        i = torch.arange(self.b, device=self.c3a_kernel.device)
        blocks = self.c3a_kernel[:, :, (i[None] - i[:, None]) % self.b]  # (out/b, in/b, row, column)
        return blocks.transpose(1, 2).reshape(self.site.shape) / self.width
