"""The short way through a linear layer whose active adapters are all low-rank: one call, decided in advance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.core.adapter import Additive
from veneer.ops.lowrank import LowRank, fused_linear, joined

if TYPE_CHECKING:
    from veneer.engine.adapted import Adapted


class LowRankPath:
    """Runs one layer and the joined branches of its adapters; ``None`` from a call means: go the long way.

    Args:
        host: the wrapper.
        names: its active adapters, or in a mixed batch those that any row uses.
        route: the adapter of each row, in a mixed batch.
    """

    def __init__(self, host: Adapted, names: list[str], route: tuple[str, ...] | None):
        self.layer: nn.Linear = host.base_layer
        self.state, self.names, self.route = host.state, names, route
        self.adapters: list[Additive] = [host.adapters[name] for name in names]

    def __call__(self, x: Tensor) -> Tensor | None:
        layer = self.layer
        weight = layer.weight
        if weight.requires_grad or x.dtype != weight.dtype or "forward" in layer.__dict__:
            return None
        if layer._forward_hooks or layer._forward_pre_hooks:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        lows: list[LowRank] = []
        for adapter in self.adapters:
            low = adapter.low_rank()
            if low is None or low.bias is not None:
                return None
            if (low.dropout or low.gain is not None) and (self.route or len(self.adapters) > 1):
                return None  # what only one branch can have
            if low.a.dtype != x.dtype and x.dtype not in _HALF:
                return None
            lows.append(low)
        if self.route is None and len(lows) == 1:
            return fused_linear(x, weight, layer.bias, lows[0])
        return fused_linear(x, weight, layer.bias, joined(lows), self._mask(x, lows))

    def _mask(self, x: Tensor, lows: list[LowRank]) -> Tensor:
        """Each row's scaling of each part of the stacked rank, 0 where it is another row's: (N or 1, total rank)."""
        parts = tuple([(name, low.a.shape[0], low.scaling) for name, low in zip(self.names, lows)])
        if self.route is None:
            return self.state.mask(1, parts, x.device, x.dtype)
        mask = self.state.mask(x.shape[0], parts, x.device, x.dtype)
        inner = x[..., 0].numel() // x.shape[0]
        return mask if inner == 1 else mask.repeat_interleave(inner, 0)


_HALF = (torch.float16, torch.bfloat16)


def path(host: Adapted, names: list[str], route: tuple[str, ...] | None) -> LowRankPath | None:
    """The short way for these adapters at this layer, or None where there is none."""
    layer = host.base_layer
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        return None
    if host.site.kind != "linear" or getattr(host.site, "turned", False) or not layer.weight.is_floating_point():
        return None
    adapters = [host.adapters[name] for name in names]
    with torch.no_grad():  # only asked here; saving tensors now would have a checkpoint count them
        if not all(isinstance(a, Additive) and a.low_rank() is not None for a in adapters):
            return None
    return LowRankPath(host, names, route)
