"""PEANuT: Parameter-Efficient Adaptation with weight-aware Neural Tweakers (Zhong et al., 2024, arXiv:2410.01870).

    W' = W + s f(W^T)^T        f(X) = h_d B^T,  h_0 = act(X A^T), then `depth` encoders E_i and decoders D_i:
                               h <- act(h E_i^T),   h <- act(h D_i^T) + (what the matching encoder was given)

A (r, out), B (out, r), E_i and D_i (r, r). B starts at zero, the rest Kaiming-uniform. Cost: 4 r in out FLOPs a step to
build the change from the weight, and twice that for the gradients; the sum of both runs the layer, whose gradient is
2 N in out for N tokens, half of the frozen layer's step. In eval it is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Additive
from veneer.core.cache import cached
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "linear": lambda x: x,
}
"""transformers' names of activations."""


@dataclass
class PeanutConfig(LayerConfig):
    """Settings of PEANuT.

    Attributes:
        r: width of the tweaker.
        depth: pairs of inner layers.
        act_fn: its non-linearity.
        scaling: s.
        init_weights: True starts as the base model, False at random values.
    """

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    type: ClassVar[str | None] = "PEANUT"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")
        if self.depth < 0:
            raise ValueError(f"depth must not be negative, but is {self.depth}.")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"Unknown act_fn '{self.act_fn}'; known are {', '.join(ACTIVATIONS)}.")


@method("PEANUT", PeanutConfig)
class Peanut(Additive):
    """A small network that reads the weight and writes its change."""

    reads_weight = True
    dense = True

    def __init__(self, site: Site, config: PeanutConfig):
        super().__init__(site, config)
        r, out = config.r, site.out_features
        self.scaling, self.act = config.scaling, config.act_fn
        self.peanut_A = nn.Linear(out, r, bias=False)
        self.peanut_B = nn.Linear(r, out, bias=False)
        self.peanut_encoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(config.depth))
        self.peanut_decoders = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(config.depth))
        for layer in (self.peanut_A, *self.peanut_encoders, *self.peanut_decoders):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.peanut_B.weight)

    def delta(self, x: Tensor) -> Tensor:
        return self.site(x, cached(self, "delta", self.delta_weight, self.site.weight))

    def delta_weight(self) -> Tensor:
        act = ACTIVATIONS[self.act]
        w = self.site.weight.flatten(1).to(self.dtype)
        h, given = act(self.peanut_A(w.mT)), []  # (in, r)
        for encoder in self.peanut_encoders:
            given.append(h)
            h = act(encoder(h))
        for decoder in self.peanut_decoders:
            h = act(decoder(h)) + given.pop()
        return (self.scaling * self.peanut_B(h).mT).reshape(self.site.shape)
