"""The one wrapper: a layer with adapters around it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.func import functional_call

from veneer.core import lean
from veneer.core.adapter import Adapter, Base, Reweight, made_again
from veneer.core.cache import cached
from veneer.core.sites import Site
from veneer.engine import experts_path
from veneer.engine.by_rows import by_rows
from veneer.engine.compiled import switchable, switched, twins
from veneer.engine.folding import calling, fold, stand_around, standing_in
from veneer.engine.lowrank_path import PLAIN, LowRankPath, path
from veneer.engine.mergeable import Mergeable
from veneer.engine.mergeable import hosts as hosts
from veneer.engine.state import BASE as BASE
from veneer.engine.state import State as State


class Adapted(Mergeable):
    """A layer with named adapters around it, of any methods, side by side."""

    is_adapted = True
    number: int
    """Of the wrapper, for the switchboard."""
    _decided: int = -1
    _names: tuple[str, ...] | list[str] = ()
    _path: LowRankPath | None = None
    _alone: tuple[Adapter, ...] = ()
    group: Any = None
    """The layers that are called with the same input as this one (``blocks.Group``), if any."""
    twins: dict[str, nn.Module] | None = None
    """The adapters as compiled graphs see them, once there is such a graph."""

    def __init__(self, base_layer: nn.Module, site: Site, state: State):
        lean.begin(self)
        self._modules.update(base_layer=base_layer, adapters=lean.module_dict())
        number = state.enter(_device(base_layer))
        # Past torch's own way to set attributes, which takes longer than all the rest.
        training = base_layer.training
        self.__dict__.update(site=site, state=state, number=number, gains={}, merged_names=(), training=training)

    # Torch finds modules only after every other kind of attribute was missed.
    @property
    def base_layer(self) -> Any:
        """The layer that this one stands around; perhaps a wrapper itself."""
        return self._modules["base_layer"]

    @base_layer.setter
    def base_layer(self, layer: nn.Module) -> None:
        self._modules["base_layer"] = layer

    @property
    def adapters(self) -> Any:
        """name -> Adapter"""
        return self._modules["adapters"]

    # ---- forward ----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return self._traced(args, kwargs)
        state = self.state
        if not state.enabled:
            layer = self._modules["base_layer"]  # the plain lookup is slow enough to show, and so is a module's call
            hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
            return (layer if hooked or layer._backward_pre_hooks else layer.forward)(*args, **kwargs)
        if self._decided != state.version:
            self._decide(state)
        if self._path is not None and len(args) == 1 and not kwargs:
            y = self._path(args[0])
            if y is not None:
                return y
        return self._long(args, kwargs)

    def _traced(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The forward of a compiled graph."""
        if self._twinned() and switchable(self, alone=len(args) == 1 and not kwargs):
            x, args = self._first(args, kwargs)
            return switched(self, x, args, kwargs)
        if not self.state.enabled:
            return self._modules["base_layer"](*args, **kwargs)
        if self._decided != self.state.version:
            self._decide(self.state)
        return self._long(args, kwargs)

    def _long(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any adapters around the layer, however it is called."""
        state = self.state
        if self._alone and len(args) == 1 and not kwargs:
            adapter, layer = self._alone[0], self._modules["base_layer"]
            if adapter.dense and not is_compiling() and self._sums(layer):
                return self._summed(adapter, layer, args[0])
            if not isinstance(adapter, Reweight):
                return adapter(args[0], layer)
        if state.route is not None:
            return by_rows(self, state.route, args, kwargs)
        if not self._names:
            return self._modules["base_layer"](*args, **kwargs)
        x, args = self._first(args, kwargs)
        return self.around(self._names, self._layer(args, kwargs), args, kwargs)(x)

    def settle(self) -> None:
        """Take note of adapters that came or went, or got other tensors or scalings."""
        self.state.settled += 1
        self.state.renew()
        if self.twins is not None:
            self.__dict__["twins"] = twins(self)

    def _twinned(self) -> bool:
        """Make the adapters' twins, while a graph is traced, where it can be one for all choices; whether it can."""
        self.state.trace()
        inner = list(hosts(self))
        for host in inner:
            host.__dict__["twins"] = twins(host)
        return all(host.twins is not None for host in inner)

    # Run while tracing, and not traced: ``torch.compiler.assume_constant_result``, which would import the compiler.
    _twinned._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Adapted:
        # What was kept from the factors is not to outlive their training.
        self.__dict__.update(training=mode, _decided=-1, _path=None if mode else self._path)
        for module in (*self._modules.values(), *(self.twins or {}).values()):
            module.train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if n not in ("twins", "_path")} | {"_decided": -1}

    def set_gain(self, name: str, gain: float | Tensor) -> None:
        """How much of an adapter there is at this layer."""
        number = isinstance(gain, float | int)
        self.gains.pop(name, None)
        if not number or gain != 1:
            self.gains[name] = gain
        self.state.at(self.number, name, float(gain) if number else 1.0)
        self.settle()

    def _decide(self, state: State) -> None:
        """Which adapters run here, and whether a short way serves them: once per change of the switchboard."""
        own = self._modules["adapters"]._modules
        wanted = state.active if state.route is None else sorted(set(state.route))  # one order for all routes
        names = [name for name in wanted if name in own and name not in self.merged_names]
        short = alone = None
        if names and not state.gains and not self.gains:
            short = path(self, names, state.route, self._path)
            alone = own[names[0]] if state.route is None and len(names) == 1 else None
        just = (alone,) if alone is not None and self._just_stands_around(alone) else ()
        self.__dict__.update(_decided=state.version, _names=names, _path=short, _alone=just)

    def _summed(self, adapter: Adapter, layer: nn.Module, x: Tensor) -> Tensor:
        """The layer run once, with its weight and the change of it in one; that is kept where nothing trains."""
        site = self.site
        if adapter.training or torch.is_grad_enabled():
            return adapter.summed(x, site.weight, site.bias)
        own = layer._parameters.values()
        return site(x, *cached(adapter, "sum", lambda: adapter.merged(site.weight, site.bias), *own))

    @staticmethod
    def _sums(layer: nn.Module) -> bool:
        """Whether weight + change may stand in for both: nobody looks on, and the sum rounds no more than they do."""
        if layer._forward_hooks or layer._forward_pre_hooks:
            return False
        weight = layer._parameters.get("weight")
        plain = type(weight) is nn.Parameter and "forward" not in layer.__dict__
        return plain and weight.dtype in (torch.float32, torch.float64)

    def _just_stands_around(self, adapter: Adapter) -> bool:
        """Whether the adapter needs nothing but the layer's input and the layer."""
        build, inside = type(adapter), isinstance(adapter, Reweight) and not adapter.dense or not self.site.maps_input
        copies = build.replacement is not Adapter.replacement or build.overrides is not Adapter.overrides
        return not (inside or copies or build.reads_call)

    def _first(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple]:
        if args:
            return args[0], args[1:]
        first = self.site.first if self.site.first in kwargs else next(iter(kwargs))
        return kwargs.pop(first), ()

    def _layer(self, args: tuple, kwargs: dict[str, Any]) -> Base:
        base_layer = self.base_layer
        return lambda h: base_layer(h, *args, **kwargs)

    def around(self, names: Iterable[str], layer: Base, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Base:
        """Fold ``names`` around ``layer``: weight-level adapters first, then the others, innermost first."""
        own = [(name, self.adapters[name]) for name in names]
        inside = [(n, a) for n, a in own if isinstance(a, Reweight) or not self.site.maps_input]
        if inside:
            layer = self._reweighted(inside, args, kwargs or {})
        for name, adapter in own:
            if isinstance(adapter, Reweight) or not self.site.maps_input:
                continue
            if (copy := adapter.replacement()) is not None:
                layer = calling(copy, args, kwargs or {})
            elif (new := adapter.overrides()) is not None:
                layer = self._overridden(new, args, kwargs or {})
            else:
                around = functools.partial(adapter, call=(args, kwargs or {})) if adapter.reads_call else adapter
                layer = stand_around(around, layer, self._gain(name))
        return layer

    def _overridden(self, new: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Base:
        """The inner layer, called with ``new`` in place of the base layer's own parameters."""
        depth, layer = "", self.base_layer
        while getattr(layer, "is_adapted", False):
            depth, layer = depth + "base_layer.", layer.base_layer
        if not is_compiling():
            return lambda h: standing_in(layer, new, self.base_layer, (h, *args), kwargs)
        prefixed = {depth + name: value for name, value in new.items()}
        return lambda h: functional_call(self.base_layer, prefixed, (h, *args), kwargs)

    def _reweighted(self, inside: list[tuple[str, Adapter]], args: tuple, kwargs: dict[str, Any]) -> Base:
        if self.site.kind == "parameter":
            short = experts_path.way(list(hosts(self)), [name for name, _ in inside], args, kwargs)
            if short is not None:
                return short
        dtype = self.site.dtype
        again = torch.is_grad_enabled() and all(adapter.dense and adapter.again for _, adapter in inside)
        if again and self.site.maps_input:
            return self._reweighted_again(inside, args, kwargs)
        weight, bias = self._fold(inside)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if self.site.maps_input:
            return lambda h: self.site(h, weight, bias, *args, **kwargs)
        return self._overridden(self.site.replaced(weight, bias), args, kwargs)

    def _reweighted_again(self, inside: list[tuple[str, Adapter]], args: tuple, kwargs: dict[str, Any]) -> Base:
        """The same, with a weight that is made again for the backward pass."""
        site, pairs, own = self.site, [(adapter, self._gain(name)) for name, adapter in inside], self._inner_bias()
        stored = site.stored
        plain = site.weight if type(stored) in PLAIN and stored.is_floating_point() else None  # else unpacked again too

        def run(x: Tensor) -> Tensor:
            weight, bias = fold(pairs, site.weight if plain is None else plain, own)
            return site(x, weight.to(site.dtype), None if bias is None else bias.to(site.dtype), *args, **kwargs)

        return lambda h: made_again(run, h, stored, *[adapter for adapter, _ in pairs])

    def _apply(self, fn: Any, recurse: bool = True) -> Adapted:
        super()._apply(fn, recurse)
        self.state.reach(_device(self.base_layer))
        self.settle()
        aside = [self.lent, *(a.residual for a in self.adapters.values())]  # weights that no module holds now
        for parameters in aside:
            for parameter in (parameters or {}).values():
                if parameter is not None and parameters is not self.guest:
                    parameter.data = fn(parameter.data)
        return self

    # ---- what strangers read ----------------------------------------------------------------------------------------
    def get_base_layer(self) -> nn.Module:
        """The layer under all wrappers."""
        layer = self.base_layer
        return layer.get_base_layer() if getattr(layer, "is_adapted", False) else layer

    def each(self, leaf: str) -> dict[str, Any]:
        """adapter name -> that adapter's attribute ``leaf``, for the adapters that have it."""
        return {name: getattr(a, leaf) for name, a in self.adapters.items() if hasattr(a, leaf)}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "adapters" not in self.__dict__.get("_modules", {}):
                raise
        found = self.each(name)
        return found if found else getattr(self.base_layer, name)


def _device(layer: nn.Module) -> torch.device:
    lead = next((p for p in layer._parameters.values() if p is not None), None)
    return torch.device("cpu") if lead is None else lead.device
