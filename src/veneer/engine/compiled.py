"""A wrapper's forward inside a compiled graph, which is the same whatever adapters are on.

Every adapter at the layer has its place in the graph, times how much of it there is now: a number that the graph reads
from a tensor. So no switch of adapters, of their strengths, of the rows of a mixed batch, nor ``disable_adapter``,
compiles anything again; an adapter that is off costs what one that is on costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Additive, Base, Reweight
from veneer.core.parts import is_cut
from veneer.engine.folding import calling, fold, mixed, stand_around
from veneer.ops.lowrank import LowRank

if TYPE_CHECKING:
    from veneer.engine.adapted import Adapted

AFFINE = ("linear", "conv1d_hf", "conv")
"""Kinds of layers that are a linear map of their input and a bias."""


def twins(host: Adapted) -> dict[str, Any] | None:
    """The adapters as a graph is to see them: on the same storage, but always asking for gradients.

    For a graph is bound to which of its tensors train, and that changes with every switch. The gradients go on to the
    adapters' own parameters, and end there where those are frozen.

    Returns:
        name -> twin; None where an adapter may not run while it is off, where one keeps something of its forward for
        the loss, and where parameters are sharded, so that others stand in for them in each call.
    """
    for adapter in host.adapters.values():
        if not adapter.switches or adapter.training and type(adapter).penalty is not Adapter.penalty:
            return None
    numbers = all(isinstance(gain, float | int) for gain in host.gains.values())
    if not numbers or any(is_cut(p) for p in host.adapters.parameters()):
        return None
    known: dict[int, nn.Module] = {}
    with torch.inference_mode(False), torch.enable_grad():
        return {name: _twin(adapter, known) for name, adapter in host.adapters.items()}


def _twin(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """The module's twin, which holds and refers to twins."""
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = object.__new__(type(module))
    twin.__dict__ = {name: _with_twins(value, known) for name, value in module.__dict__.items()}
    twin.__dict__["_parameters"] = {name: _alias(p) for name, p in module._parameters.items()}
    twin.__dict__["_modules"] = {name: _with_twins(child, known) for name, child in module._modules.items()}
    return twin


def _with_twins(value: Any, known: dict[int, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return _twin(value, known)
    return type(value)(_with_twins(v, known) for v in value) if type(value) in (tuple, list) else value


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


def switchable(host: Adapted, alone: bool) -> bool:
    """Whether a graph of this call can serve all choices: copies run besides the layer, which only that allows.

    Args:
        host: the wrapper, which has twins.
        alone: the layer is called with nothing but its input; a cache, say, would be written twice.
    """
    return alone or all(type(a).replacement is Adapter.replacement for a in host.adapters.values())


class Share(NamedTuple):
    """How much of an adapter there is."""

    on: Tensor
    """1, or 0 where it is off: a number, in a mixed batch one for each row."""
    gain: Tensor
    """A number."""
    felt: Any
    """A further gain, which is none."""

    @property
    def gains(self) -> Tensor:
        """Both gains."""
        return self.gain if self.felt is None else self.gain * self.felt

    def of(self, dims: int) -> Tensor:
        """All in one, in the shape that goes with a layer's output of ``dims`` dimensions, the first of them rows."""
        return self.gains * (self.on if self.on.dim() == 0 else self.on.reshape(-1, *[1] * (dims - 1)))


def switched(host: Adapted, x: Any, args: tuple, kwargs: dict[str, Any], given: dict[str, Tensor] | None = None) -> Any:
    """The layer with all its adapters around it, each as strong as the switchboard's tensors say.

    Args:
        host: the wrapper.
        x: the layer's input.
        args: what else the layer is called with.
        kwargs: the same, by name.
        given: what an outer wrapper puts in place of the layer's own tensors.

    Raises:
        ValueError: a mixed batch that is no multiple of the names it was given.
    """
    site, base = host.site, _holding(host, given or {}, args, kwargs)
    shares = _shares(host, x.device, x.shape[site.batch_dim])
    own = {name: host.twins[name] for name in shares}  # type: ignore[index]
    if own and not args and not kwargs and type(host.base_layer) is nn.Linear:
        lows = [adapter.low_rank() if isinstance(adapter, Additive) else None for adapter in own.values()]
        if all(_plain(low) and share.felt is None for low, share in zip(lows, shares.values(), strict=True)):
            return _side_by_side(x, base, lows, list(shares.values()))  # type: ignore[arg-type]
    layer, dims = base, x.dim() + (site.kind == "embedding")
    inside = [name for name, adapter in own.items() if isinstance(adapter, Reweight) or not site.maps_input]
    for names in [[name] for name in inside] if host.state.owners else [inside] if inside else []:
        layer = _reweighted(host, {name: shares[name] for name in names}, layer, given or {}, args, kwargs)
    affine, stands = site.kind in AFFINE and not getattr(host.base_layer, "is_adapted", False), bool(inside)
    for name in [name for name in own if name not in inside]:
        adapter, share = own[name], shares[name]
        if (copy := adapter.replacement()) is not None:
            layer = _either(share.on, layer, calling(copy, args, kwargs))
        elif (new := adapter.overrides()) is not None:
            layer = _overridden(host, share.on, new, layer if stands else None, args, kwargs)
        elif type(adapter).forward is Additive.forward:
            layer = stand_around(adapter, layer, share.of(dims))
        else:
            around = functools.partial(adapter, call=(args, kwargs)) if adapter.reads_call else adapter
            layer = _around(around, layer, share, affine)
        affine, stands = affine and adapter.mergeable, True
    return layer(x)


def _shares(host: Adapted, device: torch.device, batch: int | None = None) -> dict[str, Share]:
    """name -> how much of it there is, for the adapters that are not merged, in the order they are laid around.

    Args:
        host: the wrapper, which has twins.
        device: where that is needed.
        batch: how many rows there are, to tell them apart in a mixed batch.
    """
    state = host.state
    on, gains = _of(state.on, device), _of(state.strengths, device)[host.number]
    if state.owners and batch is not None:
        owners = _of(state.owners, device)
        on = on * owners.repeat_interleave(state.times(batch, owners.shape[0]), 0)
    shares = {}
    for i, name in enumerate(state.order):
        if name in host.twins and name not in host.merged_names:  # type: ignore[operator]
            felt = state.felt.get(name)
            felt = felt.get(host.site.path) if isinstance(felt, dict) else felt
            shares[name] = Share(on[..., i], gains[i], felt)
    return shares


def _of(tables: dict[str, Tensor], device: torch.device) -> Tensor:
    found = tables.get(str(device))
    return tables["cpu"].to(device) if found is None else found


# ---- ways to be around a layer --------------------------------------------------------------------------------------
def _plain(low: LowRank | None) -> bool:
    return low is not None and not low.dropout and low.bias is low.gain is None


def _side_by_side(x: Tensor, layer: Base, lows: list[LowRank], shares: list[Share]) -> Tensor:
    """Low-rank branches as one: their ranks stacked, each rank's product times the branch's scaling and strength."""
    a, b = torch.cat([low.a for low in lows]).to(x.dtype), torch.cat([low.b for low in lows], 1).to(x.dtype)
    each = [(s.on * s.gain * low.scaling).unsqueeze(-1) for s, low in zip(shares, lows, strict=True)]
    each = [s.expand(*s.shape[:-1], len(low.a)) for s, low in zip(each, lows, strict=True)]
    by_rank = torch.cat(each, -1).to(x.dtype)
    if by_rank.dim() > 1:
        by_rank = by_rank.reshape(len(x), *[1] * (x.dim() - 2), -1)
    return layer(x) + F.linear(F.linear(x, a) * by_rank, b)


def _holding(host: Adapted, given: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Base:
    """What is inside the wrapper, with ``given`` in place of the base layer's own tensors."""
    inner = host.base_layer
    if not given:
        return calling(inner, args, kwargs)
    if getattr(inner, "is_adapted", False) and inner.site.kind == "parameter":
        return lambda h: switched(inner, h, args, kwargs, given)
    return host._overridden(given, args, kwargs)


def _reweighted(
    host: Adapted, shares: dict[str, Share], layer: Base, given: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]
) -> Base:
    """The layer with its weight changed; in a mixed batch, whose rows' weights differ, with one adapter's at a time."""
    site, rows, own = host.site, bool(host.state.owners), host.twins
    pairs = [(own[n], s.gains if rows else s.of(0)) for n, s in shares.items()]  # type: ignore[index]
    weight, bias = fold(pairs, site.weight, _inner_bias(host, shares))
    weight, bias = weight.to(site.dtype), None if bias is None else bias.to(site.dtype)
    if site.maps_input:
        new: Base = lambda h: site(h, weight, bias, *args, **kwargs)  # noqa: E731
    else:
        new = _holding(host, given | site.replaced(weight, bias), args, kwargs)
    return _either(next(iter(shares.values())).on, layer, new, site.batch_dim) if rows else new


def _inner_bias(host: Adapted, names: Iterable[str]) -> Tensor | None:
    """The layer's bias, or the one that an inner wrapper's adapter puts in its place."""
    bias, rows, inner = host.site.bias, bool(host.state.owners), host.base_layer
    while getattr(inner, "is_adapted", False):
        for name, share in _shares(inner, inner.site.device).items():
            new = (inner.twins[name].overrides() or {}).get("bias")
            if new is not None and (not rows or name in names):
                bias = new if rows else torch.where(share.on > 0, new, bias)
        inner = inner.base_layer
    return bias


def _overridden(
    host: Adapted, on: Tensor, new: dict[str, Tensor], layer: Base | None, args: tuple, kwargs: dict[str, Any]
) -> Base:
    """The base layer with ``new`` for its own tensors where the adapter is on; where off, ``layer``, or as it is."""
    if layer is not None or on.dim():
        plain = layer or calling(host.base_layer, args, kwargs)
        return _either(on, plain, host._overridden(new, args, kwargs), host.site.batch_dim)
    old = {name: host.site.module.get_parameter(name) for name in new}
    return host._overridden({name: torch.where(on > 0, new[name], old[name]) for name in new}, args, kwargs)


def _around(adapter: Callable, layer: Base, share: Share, affine: bool) -> Base:
    """Any adapter around the layer, which runs once if the adapter leaves its input or its output alone.

    Args:
        adapter: called with the layer's input and the layer.
        layer: what is inside.
        share: how much of the adapter there is.
        affine: ``layer`` is an affine map, so it makes of a mean of inputs the mean of their outputs.
    """

    def run(h: Tensor) -> Any:
        calls: list[tuple[Tensor | None, Any]] = []

        def seen(g: Tensor) -> Any:
            calls.append((g, layer(g)))
            return calls[-1][1]

        new = adapter(h, seen)
        (g, y), *more = calls or [(None, None)]
        if affine and share.felt is None and not more and new is y and g is not h:
            return layer(_mean(share.of(h.dim()), h, g))
        old = next((y for g, y in calls if g is h), None)
        return mixed(lambda y, z: _mean(share.of(y.dim()), y, z), layer(h) if old is None else old, new)

    return run


def _either(on: Tensor, layer: Base, new: Base, dim: int = 0) -> Base:
    """``new`` where ``on``, by rows in a mixed batch; else ``layer``."""

    def chosen(y: Tensor, z: Tensor) -> Tensor:
        here = on if on.dim() == 0 else on.reshape(-1, *[1] * (y.dim() - 1 - dim))
        return torch.where(here > 0, z, y)

    return lambda h: mixed(chosen, layer(h), new(h))


def _mean(share: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """y + share (z - y), which is exactly y or z at 0 or 1."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return torch.lerp(y.to(wide), z.to(wide), share.to(wide)).to(y.dtype)
