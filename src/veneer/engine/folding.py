"""How an adapter is put around what a layer does already."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.core.adapter import Adapter, Additive, Base


def stand_around(adapter: Adapter, layer: Base, gain: float | Tensor | None) -> Base:
    """``adapter`` around ``layer``, its change of the output times ``gain``."""
    if gain is None:
        return lambda h: adapter(h, layer)

    def scaled(h: Tensor) -> Tensor:
        y = layer(h)
        g = gain
        if isinstance(g, Tensor):
            g = g if g.dim() < 3 or g.shape[1] <= y.shape[1] else g[:, -y.shape[1] :]  # a head sees the last tokens
            g = g.to(y.device)
        if isinstance(adapter, Additive) and type(adapter).forward is Additive.forward:
            return y + (g * adapter.change(h)).to(y.dtype)
        return y + (g * (adapter(h, known(layer, h, y)) - y)).to(y.dtype)

    return scaled


def calling(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Base:
    """``module`` as a function of its first input alone."""
    return lambda h: module(h, *args, **kwargs)


def known(f: Base, x: Tensor, y: Tensor) -> Base:
    """``f``, remembering that ``f(x) = y``: an adapter that leaves its input alone costs no second call."""
    return lambda h: y if h is x else f(h)
