"""A wrapper's forward inside a compiled graph, which is the same whatever adapters are on.

Every adapter at the layer has its place in the graph, times how much of it there is now: a number that the graph reads
from a tensor. So no switch of adapters, of their strengths, of the rows of a mixed batch, nor ``disable_adapter``,
compiles anything again; an adapter that is off costs what one that is on costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Base
from veneer.core.parts import is_cut
from veneer.engine.folding import stand_around
from veneer.ops.lowrank import LowRank

if TYPE_CHECKING:
    from veneer.engine.adapted import Adapted


def twins(host: Adapted) -> dict[str, nn.Module] | None:
    """The adapters as a graph is to see them: on the same storage, but always asking for gradients.

    For a graph is bound to which of its tensors train, and that changes with every switch. The gradients go on to the
    adapters' own parameters, and end there where those are frozen.

    Returns:
        name -> twin; None where an adapter cannot just be laid around the layer, times a number, and where parameters
        are sharded, so that others stand in for them in each call.
    """
    plain = host.site.maps_input and all(isinstance(gain, float | int) for gain in host.gains.values())
    plain = plain and all(adapter.switches for adapter in host.adapters.values())
    if not plain or any(is_cut(p) for p in host.adapters.parameters()):
        return None
    with torch.inference_mode(False), torch.enable_grad():
        return {name: _twin(adapter) for name, adapter in host.adapters.items()}


def _twin(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin.__dict__["_parameters"] = {name: _alias(p) for name, p in module._parameters.items()}
    twin.__dict__["_modules"] = {name: child and _twin(child) for name, child in module._modules.items()}
    return twin


def _alias(parameter: nn.Parameter | None) -> Tensor | None:
    if parameter is None or not parameter.is_floating_point():
        return parameter
    trains = parameter.requires_grad
    alias = _Alias.apply(parameter.requires_grad_())
    parameter.requires_grad_(trains)
    return alias


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def switched(host: Adapted, x: Any, layer: Base, plain: bool) -> Any:
    """The layer with all its adapters around it, each as strong as the switchboard's tensors say.

    Args:
        host: the wrapper.
        x: the layer's input.
        layer: the layer, called with what else it was given.
        plain: whether that was nothing.

    Raises:
        ValueError: a mixed batch that is no multiple of the names it was given.
    """
    state, own = host.state, host.twins
    names = [n for n in state.order if n in own and n not in host.merged_names]
    strength = _of(state.strengths, x.device)[host.number]
    strength = [strength[i] for i, n in enumerate(state.order) if n in names]
    if state.owners:
        rows = _of(state.owners, x.device)
        rows = rows.repeat_interleave(state.times(x.shape[0], rows.shape[0]), 0)
        own_rows = [rows[:, i] for i, n in enumerate(state.order) if n in names]
        strength = [s * r for s, r in zip(strength, own_rows, strict=True)]
    if plain and type(host.base_layer) is nn.Linear and not any(n in state.felt for n in names):
        lows = [own[n].low_rank() for n in names]
        if names and all(low is not None and not low.dropout and low.bias is low.gain is None for low in lows):
            return _side_by_side(x, layer, lows, strength)
    dims = x.dim() + (host.site.kind == "embedding")  # of the layer's output
    for name, s in zip(names, strength, strict=True):
        s = s if s.dim() == 0 else s.reshape(-1, *[1] * (dims - 1))
        gain = state.felt.get(name)
        gain = gain.get(host.site.path) if isinstance(gain, dict) else gain
        layer = stand_around(own[name], layer, s if gain is None else s * gain)
    return layer(x)


def _side_by_side(x: Tensor, layer: Base, lows: list[LowRank], strength: list[Tensor]) -> Tensor:
    """Low-rank branches as one: their ranks stacked, each rank's product times the branch's scaling and strength."""
    a, b = torch.cat([low.a for low in lows]).to(x.dtype), torch.cat([low.b for low in lows], 1).to(x.dtype)
    each = [(s * low.scaling).unsqueeze(-1).expand(*s.shape, len(low.a)) for s, low in zip(strength, lows, strict=True)]
    by_rank = torch.cat(each, -1).to(x.dtype)
    if by_rank.dim() > 1:
        by_rank = by_rank.reshape(len(x), *[1] * (x.dim() - 2), -1)
    return layer(x) + F.linear(F.linear(x, a) * by_rank, b)


def _of(tables: dict[str, Tensor], device: torch.device) -> Tensor:
    found = tables.get(str(device))
    return tables["cpu"].to(device) if found is None else found
