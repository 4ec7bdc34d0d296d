"""Small models, one per kind of layer, that the laws run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Chain(nn.Module):
    """Modules in a row; the adapted one is called ``layer``, a plain frozen one before it ``first``."""

    def __init__(self, first: nn.Module | None, layer: nn.Module, last: nn.Module | None = None):
        super().__init__()
        self.first, self.layer, self.last = first or nn.Identity(), layer, last or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.first(x)))


class Conv1D(nn.Module):
    """transformers' Conv1D, by its facts: weight (in, out), y = x W + b."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.2)
        self.bias = nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class SelfAttention(nn.Module):
    """Attention of a sequence over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """Fused experts with a fixed dense routing, enough to reach both parameters."""

    def __init__(self, experts: int = 3, width: int = 8, hidden: int = 6):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, hidden, width) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(torch.einsum("...i,eoi->...eo", x, self.gate_up_proj))
        return torch.einsum("...ei,eoi->...o", h, self.down_proj)


class FeedForward(nn.Module):
    """A gated feed-forward block, as Llama has it."""

    def __init__(self, width: int = 8, hidden: int = 12):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj, self.act_fn = nn.Linear(hidden, width, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Kind:
    """One layer kind: a model, its input, and how a config targets the layer."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    targets: dict[str, Any]


def _floats(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(*shape)


LAYER = {"target_modules": ["layer"]}
KINDS = {
    kind.name: kind
    for kind in [
        Kind("linear", lambda: Chain(nn.Linear(8, 8), nn.Linear(8, 16)), _floats(4, 3, 8), LAYER),
        Kind("linear_no_bias", lambda: Chain(nn.Linear(8, 16), nn.Linear(16, 8, bias=False)), _floats(4, 8), LAYER),
        Kind("conv1d_hf", lambda: Chain(nn.Linear(8, 8), Conv1D(16, 8)), _floats(4, 3, 8), LAYER),
        Kind("conv1d", lambda: Chain(None, nn.Conv1d(8, 16, 3, padding=1)), _floats(4, 8, 6), LAYER),
        Kind("conv2d", lambda: Chain(None, nn.Conv2d(8, 16, 3, stride=2, padding=1)), _floats(4, 8, 6, 6), LAYER),
        Kind(
            "conv2d_odd",
            lambda: Chain(None, nn.Conv2d(8, 16, (3, 1), padding=(2, 0), dilation=(2, 1), padding_mode="circular")),
            _floats(4, 8, 6, 6), LAYER,
        ),
        Kind("conv2d_1x1", lambda: Chain(None, nn.Conv2d(8, 16, 1)), _floats(4, 8, 5, 5), LAYER),
        Kind(
            "conv2d_grouped", lambda: Chain(None, nn.Conv2d(8, 16, 3, padding=1, groups=2)), _floats(4, 8, 5, 5), LAYER
        ),
        Kind("conv3d", lambda: Chain(None, nn.Conv3d(8, 16, (1, 1, 3))), _floats(4, 8, 3, 3, 4), LAYER),
        Kind(
            "embedding", lambda: Chain(None, nn.Embedding(24, 8), nn.Linear(8, 4)),
            lambda: torch.randint(0, 24, (4, 5)), LAYER,
        ),
        Kind(
            "mha", lambda: Chain(nn.Linear(8, 8), SelfAttention()), _floats(4, 5, 8),
            {"target_modules": ["layer.attn"]},
        ),
        Kind(
            "experts", lambda: Chain(nn.Linear(8, 8), Experts()), _floats(4, 3, 8),
            {"target_modules": [], "target_parameters": ["layer.gate_up_proj", "layer.down_proj"]},
        ),
        Kind(
            "parameter", lambda: Chain(nn.Linear(8, 8), nn.Linear(8, 16)), _floats(4, 8),
            {"target_modules": [], "target_parameters": ["layer.weight"]},
        ),
        Kind(
            "block", lambda: Chain(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))),
            _floats(4, 3, 8), LAYER,
        ),
        Kind("feed_forward", lambda: Chain(nn.Linear(8, 8), FeedForward()), _floats(4, 3, 8), LAYER),
    ]
}  # fmt: skip
"""Layer kind -> how to make it. ``layernorm`` and whole modules are covered by the methods that target them."""

LINEAR = frozenset({"linear", "linear_no_bias", "conv1d_hf"})
CONV = frozenset({"conv1d", "conv2d", "conv2d_odd", "conv2d_1x1", "conv2d_grouped", "conv3d"})
WEIGHTS = frozenset({"mha", "experts", "parameter"})
ALL = frozenset(KINDS) - {"block", "feed_forward"}
