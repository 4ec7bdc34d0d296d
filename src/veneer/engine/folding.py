"""How an adapter is put around what a layer does already."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Additive, Base, Weight


def stand_around(adapter: Adapter, layer: Base, gain: float | Tensor | None) -> Base:
    """``adapter`` around ``layer``, its change of the output times ``gain``."""
    if gain is None:
        return lambda h: adapter(h, layer)

    def scaled(h: Tensor) -> Tensor:
        y = layer(h)
        g = gain
        if isinstance(g, Tensor) and isinstance(y, Tensor):
            g = g if g.dim() < 3 or g.shape[1] <= y.shape[1] else g[:, -y.shape[1] :]  # a head sees the last tokens
            g = g.to(y.device)
        if isinstance(adapter, Additive) and type(adapter).forward is Additive.forward:
            return y + (g * adapter.change(h)).to(y.dtype)
        return mixed(lambda y, z: y + (g * (z - y)).to(y.dtype), y, adapter(h, known(layer, h, y)))

    return scaled


def calling(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Base:
    """``module`` as a function of its first input alone."""
    return lambda h: module(h, *args, **kwargs)


def known(f: Base, x: Tensor, y: Tensor) -> Base:
    """``f``, remembering that ``f(x) = y``: an adapter that leaves its input alone costs no second call."""
    return lambda h: y if h is x else f(h)


def mixed(how: Callable[[Tensor, Tensor], Tensor], y: Any, z: Any) -> Any:
    """``how`` of what two layers gave, be it a tensor or some of them."""
    if isinstance(y, tuple):
        return tuple(mixed(how, a, b) for a, b in zip(y, z, strict=True))
    return how(y, z) if isinstance(y, Tensor) else y


def fold(adapters: Iterable[tuple[Adapter, float | Tensor | None]], weight: Tensor, bias: Tensor | None) -> Weight:
    """``merged`` of each adapter over (W, b), its change times its gain, in the adapters' dtype (at least float32)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    for adapter, gain in adapters:
        new_weight, new_bias = adapter.merged(weight, bias)
        if gain is not None:
            new_weight = weight + gain * (new_weight - weight)
            if new_bias is not None:
                old = torch.zeros_like(new_bias) if bias is None else bias
                new_bias = old + gain * (new_bias - old)
        weight, bias = new_weight, new_bias
    return weight, bias


def standing_in(layer: nn.Module, new: dict[str, Tensor], outer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``outer(*args, **kwargs)`` while ``new`` stands for parameters of the layer in it: ``functional_call``, which
    would take as long as a small layer does, and does not look into wrapped layers inside.
    """
    places = []
    for name in new:
        path, _, leaf = name.rpartition(".")
        holder: Any = layer.get_submodule(path)
        holder = holder.get_base_layer() if getattr(holder, "is_adapted", False) else holder
        places.append((holder._parameters, leaf))
    own = [table[leaf] for table, leaf in places]
    try:
        for (table, leaf), value in zip(places, new.values(), strict=True):
            table[leaf] = value
        return outer(*args, **kwargs)
    finally:
        for (table, leaf), value in zip(places, own, strict=True):
            table[leaf] = value
