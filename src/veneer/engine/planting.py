"""What adapters do to a model's tree: layers are wrapped, joined and given back, and hooks listen to its calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from veneer.core import lean
from veneer.core.adapter import Adapter
from veneer.core.backends import keep_layout
from veneer.core.sites import Site
from veneer.engine import blocks, root
from veneer.engine.adapted import Adapted, hosts
from veneer.engine.choosing import Choosing
from veneer.engine.places import Places


class Planting(Choosing):
    """What of a tuner changes the tree."""

    def _plant(self, name: str, site: Site, adapter: Adapter, places: Places) -> nn.Module | None:
        """Put an adapter around its layer; returns the module around a layer that had to be wrapped for it."""
        parent, leaf = self._around(site.path, places)
        current = self._child(parent, leaf)
        wrapped = None
        for host in hosts(current):
            if host.site.parameter == site.parameter and host.site.kind == site.kind and name not in host.adapters:
                break
        else:
            host, wrapped = self._wrapped(current, site), parent
            self._set_child(parent, leaf, host)
        if adapter.site is site and host.site is not site:
            adapter.site = host.site
        if not host.training:
            adapter.train(False)
        host.adapters._modules[name] = adapter
        if adapter.looks_around:
            object.__setattr__(adapter, "beside", host.adapters)  # no sub-module of its own
        if host.twins is not None:
            host.settle()
        self._hosts[name].append(host)
        if adapter.residual is not None and host not in self._split_hosts:
            self._split_hosts.append(host)
        return wrapped

    def _wrapped(self, layer: nn.Module, site: Site) -> Adapted:
        """The wrapper for a layer that is adapted for the first time; a floor above may use a class of its own."""
        return Adapted(layer, site, self.state)

    @staticmethod
    def _around(path: str, places: Places) -> tuple[nn.Module | None, str]:
        """The module that holds the one at a path, and under which name; None for the whole model."""
        place, _, leaf = path.rpartition(".")
        return (places[place] if path else None), leaf

    def _child(self, parent: nn.Module | None, leaf: str) -> nn.Module:
        return self.model if parent is None else parent._modules[leaf]

    def _set_child(self, parent: nn.Module | None, leaf: str, module: nn.Module) -> None:
        if parent is None:
            self.model = module
        else:
            parent._modules[leaf] = module

    def _take_out(self, host: Adapted, new: nn.Module, places: Places) -> nn.Module | None:
        """Put a layer where its wrapper was; returns the module around it."""
        parent, leaf = self._around(host.site.path, places)
        outer = self._child(parent, leaf)
        if outer is host:
            self._set_child(parent, leaf, new)
            return parent
        while outer.base_layer is not host:
            outer = outer.base_layer
        outer.base_layer = new
        return parent

    def _freeze_base(self) -> None:
        if self.configs:
            return
        keep_layout(self.model)
        for module in lean.inside(self.model):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    self._was_trainable.append(parameter)
                    parameter.requires_grad_(False)

    # ---- layers that run together -----------------------------------------------------------------------------------
    def _join(self, around: Iterable[nn.Module | None]) -> None:
        """Have layers run together where they can, in modules whose layers were wrapped or given back."""
        around = {module: None for module in around if module is not None}
        self._joined = [module for module in self._joined if module not in around] + blocks.arrange(around)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join(self._joined)  # a copy's groups are its own

    # ---- hooks ------------------------------------------------------------------------------------------------------
    def _watch(self) -> None:
        """Keep one hook on the model that copies the inputs adapters ask for, as long as any does."""
        self.inputs.clear()
        # A compiled graph is bound to the names there are before its first call.
        self.inputs.update(dict.fromkeys(frozenset().union(*self._wants.values())))
        if self._wants and self._hook is None:
            self._hook = self.model.register_forward_pre_hook(self._take_inputs, with_kwargs=True)
        elif not self._wants and self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self.roots and self._root_hook is None:
            self._root_hook = self.model.register_forward_pre_hook(self._ask_root, with_kwargs=True)
        elif not self.roots and self._root_hook is not None:
            self._root_hook.remove()
            self._root_hook = None

    def _ask_root(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        root.prepare(self, model, args, kwargs)

    def _take_inputs(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        accepted = lean.arguments(model)
        given = dict(zip(accepted, args, strict=False)) | kwargs
        self.inputs.clear()
        wanted = frozenset().union(*self._wants.values())
        self.inputs.update({name: given.get(name) for name in wanted})
        own = {n for n in wanted if n not in accepted}
        return args, {k: v for k, v in kwargs.items() if k not in own}
