"""The tuner: plants adapters into a model, chooses and routes them, merges them, and takes them out again."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import lean, registry
from veneer.core.adapter import Adapter, Additive
from veneer.core.backends import keep_layout
from veneer.core.config import PeftConfig
from veneer.core.parts import is_cut
from veneer.core.root import Root
from veneer.core.sites import Site
from veneer.engine import blocks, blueprint, root
from veneer.engine.adapted import BASE, Adapted, State, hosts
from veneer.engine.packed_merge import Loss, MergeReport, Way, chosen_way
from veneer.engine.places import Places


class Tuner(nn.Module):
    """A base model with named adapters in it.

    Args:
        model: the base; its layers are wrapped in place, its parameters are frozen at the first ``add``.

    Attributes:
        configs: adapter name -> its config.
        state: the switchboard that every wrapper of this model reads.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.shared: Any = nn.ModuleDict()
        self.prompts: Any = nn.ModuleDict()
        self.configs: dict[str, PeftConfig] = {}
        self.state = State()
        self.inputs: dict[str, Any] = {}
        self._hosts: dict[str, list[Adapted]] = {}
        self._training: set[str] = set()
        self._frozen: set[str] = set()
        self._was_trainable: list[nn.Parameter] = []
        self._merged_hosts: list[Adapted] = []
        self._wants: dict[str, frozenset[str]] = {}
        self._hook: Any = None
        self._root_hook: Any = None
        self._split_hosts: list[Adapted] = []
        self._joined: list[nn.Module] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # ---- adding and taking out --------------------------------------------------------------------------------------
    @lean.unswept()
    def add(
        self,
        name: str,
        config: PeftConfig,
        *,
        device: torch.device | str | None = None,
        autocast_adapter_dtype: bool = True,
        only: set[str] | None = None,
    ) -> list[Site]:
        """Build one adapter per matching layer, then plant them all; nothing is planted if any of them refuses.

        Args:
            name: the adapter's name.
            config: its settings.
            device: where its tensors go (``"meta"`` to leave them empty); default: each layer's own device.
            autocast_adapter_dtype: float32 adapters over a half-precision base; False: the base's dtype.
            only: keep just the layers with these paths.

        Raises:
            ValueError: a bad or taken name, a config that matches nothing, or a layer the method cannot sit at.
        """
        self._check_name(name)
        with self.disabled():  # a start reads the base's own weights
            build = registry.of(str(config.peft_type)).build
            if issubclass(build, Root):
                drawn = root.draw(self, build, config)
            else:
                drawn = blueprint.draw(self.model, config, self.inputs, only)
            for site, adapter in drawn.pairs:
                blueprint.placed(adapter, site, device, autocast_adapter_dtype and not adapter.keeps_dtype)
                adapter.ready()
        self._accept(drawn.pairs, config)
        merged = {host.site.path: host for host in self._merged_hosts}
        for site, _ in drawn.pairs:
            if site.path in merged:
                names = ", ".join(merged[site.path].merged_names)
                raise ValueError(f"'{site.path}' is merged ({names}); unmerge before adding an adapter there.")
        self._freeze_base()

        def placed(module: nn.Module, at: Any) -> Any:
            return blueprint.placed(module, at, device, autocast_adapter_dtype)

        if drawn.prompt is not None:
            self.prompts[name] = placed(drawn.prompt, drawn.prompt)
        if drawn.shared is not None:
            self.shared[name] = placed(drawn.shared, drawn.own[0] if drawn.own else drawn.shared)
        self._hosts[name] = []
        places = Places(self.model)
        around = [self._plant(name, site, adapter, places) for site, adapter in drawn.pairs]
        self.configs[name] = config
        builds = {type(adapter) for _, adapter in drawn.pairs}
        adds = all(build.forward is Additive.forward for build in builds)
        self.state.name(*self.configs, ordered=self.state.ordered | (set() if adds else {name}))
        self._train(name, False)
        if name in self.roots and not self.roots[name].trains_members:
            self.freeze(*self.roots[name].members)
        readers = [*builds, *([] if drawn.prompt is None else [drawn.prompt])]
        if wants := frozenset(want for reader in readers for want in getattr(reader, "wants", ())):
            self._wants[name] = wants
        self._watch()
        self._join(around)
        return drawn.own

    @property
    def roots(self) -> dict[str, Root]:
        """The adapters that stand at the whole model and govern others."""
        return {name: module for name, module in self.shared.items() if isinstance(module, Root)}

    def _free(self, name: str) -> None:
        for governor, module in self.roots.items():
            if name in module.members:
                raise ValueError(f"'{governor}' mixes the adapter '{name}'; delete '{governor}' first.")

    def _watch(self) -> None:
        """Keep one hook on the model that copies the inputs adapters ask for, as long as any does."""
        self.inputs.clear()
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

    def _join(self, around: Iterable[nn.Module | None]) -> None:
        """Have layers run together where they can, in modules whose layers were wrapped or given back."""
        around = {module: None for module in around if module is not None}
        self._joined = [module for module in self._joined if module not in around] + blocks.arrange(around)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join(self._joined)  # a copy's groups are its own

    def _ask_root(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        root.prepare(self, model, args, kwargs)

    def _take_inputs(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        accepted = inspect.signature(model.forward).parameters
        given = dict(zip(accepted, args, strict=False)) | kwargs
        self.inputs.clear()
        wanted = frozenset().union(*self._wants.values())
        self.inputs.update({name: given.get(name) for name in wanted})
        own = {n for n in wanted if n not in accepted}
        return args, {k: v for k, v in kwargs.items() if k not in own}

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

    def _accept(self, pairs: blueprint.Pairs, config: PeftConfig) -> None:
        """Refuse, by a ValueError, what has been drawn; a floor above may know more about the model's code."""

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

    def _freeze_base(self) -> None:
        if self.configs:
            return
        keep_layout(self.model)
        for module in lean.inside(self.model):
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    self._was_trainable.append(parameter)
                    parameter.requires_grad_(False)

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"An adapter's name must be a non-empty string, not {name!r}.")
        bad = sorted(set(name) & set("./\\"))
        if bad:
            raise ValueError(
                f"The adapter name '{name}' contains {' and '.join(map(repr, bad))}; use letters, digits, _ or -."
            )
        if name == BASE or hasattr(nn.ModuleDict, name) or name == "training":
            raise ValueError(f"The adapter name '{name}' is reserved; choose another.")
        if name in self.configs:
            raise ValueError(f"Adapter with name '{name}' already exists; delete it first or choose another name.")

    def delete(self, name: str) -> None:
        """Take one adapter out; layers that no adapter is left at get their own module back.

        Raises:
            ValueError: no such adapter.
        """
        self._require(name)
        self._free(name)
        leaving = {name, *(self.roots[name].members if name in self.roots else ())}
        for member in leaving:
            self.state.gains.pop(member, None)
        if leaving.intersection(self.state.route or ()):
            self.state.send(None)
        self._frozen -= leaving
        if any(name in host.merged_names for host in self._hosts[name]):
            self.unmerge()
        active = tuple(n for n in self.state.active if n not in leaving)
        if active != self.state.active:
            self.state.active = active
            self._settle()
        places, around = Places(self.model), []
        for host in reversed(self._hosts.pop(name)):
            if name in host.gains:
                host.set_gain(name, 1.0)
            del host.adapters._modules[name]
            if host.twins is not None:
                host.settle()
            if not len(host.adapters._modules):
                around.append(self._take_out(host, host.base_layer, places))
        self._split_hosts = [h for h in self._split_hosts if any(a.residual is not None for a in h.adapters.values())]
        for table in (self.shared, self.prompts):
            if name in table:
                del table[name]
        del self.configs[name]
        self._training.discard(name)
        self._frozen.discard(name)
        self.state.gains.pop(name, None)
        self.state.name(*self.configs, ordered=self.state.ordered - {name})
        self._wants.pop(name, None)
        self._watch()
        self._join(around)

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

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; its tensors, place and state stay.

        Raises:
            ValueError: no such adapter, or the new name is bad or taken.
        """
        self._require(old)
        self._free(old)
        self._check_name(new)
        for host in self._hosts[old]:
            host.adapters[new] = host.adapters.pop(old)
            host.merged_names = tuple(new if n == old else n for n in host.merged_names)
            if old in host.gains:
                host.set_gain(new, host.gains[old])
                host.set_gain(old, 1.0)
            host.settle()
        for table in (self.shared, self.prompts):
            if old in table:
                table[new] = table.pop(old)
        for names in (self._training, self._frozen):
            if old in names:
                names.remove(old)
                names.add(new)
        tables: tuple[dict[str, Any], ...] = (self.configs, self._hosts, self._wants, self.state.gains)
        for mapping in tables:
            if old in mapping:
                mapping[new] = mapping.pop(old)
        self.state.active = tuple(new if n == old else n for n in self.state.active)
        self.state.name(*self.configs, ordered={new if n == old else n for n in self.state.ordered})

    def unload(
        self,
        *,
        merge: bool = False,
        names: Sequence[str] | None = None,
        check: bool = True,
        quantized: Way | None = None,
    ) -> nn.Module:
        """The base model with its own modules back in place, and nothing of this tuner left on it.

        Args:
            merge: leave the named (default: the active) adapters' effect in the weights.
            names: which adapters to merge.
            check: refuse a merge that is not finite.
            quantized: what a merge makes of packed layers; see ``merge``.

        Raises:
            ValueError: an adapter cannot be merged; the model is as it was then.
        """
        chosen = tuple(names) if names is not None else self.state.active
        if merge:
            self.merge(*chosen, check=check, quantized=quantized)
        else:
            self.unmerge()
            self.state.active = ()
            self._settle()
        for host in self._all_hosts(innermost_first=True):
            new: nn.Module = host.base_layer
            if merge:
                for name in chosen:
                    if name in host.adapters:
                        new = host.adapters[name].replacement() or new
            for parameter in new.parameters():
                parameter.requires_grad_(False)
            self._take_out(host, new, Places(self.model))  # looked up anew: a trained copy may have come in before
        for parameter in self._was_trainable:
            parameter.requires_grad_(True)
        self._hosts, self.configs, self._merged_hosts, self._split_hosts = {}, {}, [], []
        self.state.name()
        self.shared, self.prompts = nn.ModuleDict(), nn.ModuleDict()
        self._wants = {}
        self._watch()
        self._join(self._joined)
        return self.model

    # ---- walking ----------------------------------------------------------------------------------------------------
    def _require(self, *names: str) -> None:
        for name in names:
            if name not in self.configs:
                have = ", ".join(self.configs) or "none"
                raise ValueError(
                    f"Adapter {name} not found: there is no adapter named '{name}'; this model has: {have}."
                )

    def _all_hosts(self, innermost_first: bool = False) -> list[Adapted]:
        found = list(dict.fromkeys(h for each in self._hosts.values() for h in each))
        if innermost_first:
            found.sort(key=lambda h: sum(1 for _ in hosts(h)))
        return found

    def hosts(self, name: str | None = None) -> list[Adapted]:
        """The wrappers that hold ``name`` (default: all wrappers)."""
        return list(self._hosts[name]) if name is not None else self._all_hosts()

    def adapters(self, name: str) -> Iterator[tuple[str, Adapter]]:
        """(place, adapter) for every site of one adapter. The place is what its checkpoint keys start with."""
        self._require(name)
        depth: dict[str, int] = {}
        places: list[tuple[str, Adapter]] = []
        for host in reversed(self._hosts[name]):  # planted innermost first, so the outermost comes first here
            nested = depth.get(host.site.path, 0)
            depth[host.site.path] = nested + 1
            adapter = host.adapters[name]
            place = host.site.path
            if nested or adapter.site.below:
                place = ".".join(p for p in (place, *["base_layer"] * nested, adapter.site.below) if p)
            places.append((place, adapter))
        yield from reversed(places)

    # ---- choosing ---------------------------------------------------------------------------------------------------
    def set_active(self, *names: str, trainable: bool = True) -> None:
        """Make exactly these adapters active, innermost first, and (unless frozen) the only ones that train.

        Raises:
            ValueError: no such adapter, or two of them need another base weight at one layer.
        """
        self._require(*names)
        if self._merged_hosts:
            warnings.warn("Adapters cannot be switched while merged: unmerging first.", stacklevel=2)
            self.unmerge()
        before = self.state.active
        governed = [m for n in names if n in self.roots for m in self.roots[n].members]
        if len([n for n in names if n in self.roots]) > 1:
            raise ValueError(f"Of {', '.join(names)}, more than one weighs the others; make one of them active.")
        self.state.active = tuple(dict.fromkeys([*names, *governed]))
        try:
            self._settle()
        except ValueError:
            self.state.active = before
            self._settle()
            raise
        wanted = {n for n in self.state.active if n not in self._frozen} if trainable else set()
        for name in self._training - wanted:
            self._train(name, False)
        for name in wanted:
            self._train(name, True)

    def _train(self, name: str, on: bool) -> None:
        modules: list[nn.Module] = [host._modules["adapters"]._modules[name] for host in self._hosts[name]]
        modules += [table[name] for table in (self.shared, self.prompts) if name in table]
        for module in modules:
            fixed: frozenset[str] = getattr(module, "fixed", frozenset())
            left = [module]
            while left:
                each = left.pop()
                left += [child for child in each._modules.values() if child is not None]
                for parameter in each._parameters.values():
                    if parameter is not None and parameter.requires_grad is not on:
                        parameter.requires_grad_(on)
            for key in fixed if on else ():
                module.get_parameter(key).requires_grad_(False)
        (self._training.add if on else self._training.discard)(name)

    def freeze(self, *names: str, frozen: bool = True) -> None:
        """Keep adapters from training, also when they are made active later; ``frozen=False`` lifts it."""
        self._require(*names)
        for name in names:
            (self._frozen.add if frozen else self._frozen.discard)(name)
            self._train(name, not frozen and name in self.state.active)

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Whether one adapter's tensors require gradients now, be it active or not."""
        self._require(name)
        self._train(name, trainable)

    def set_enabled(self, enabled: bool) -> None:
        """Switch all adapters off or on; off is the true base, merged or split weights put aside."""
        if enabled == self.state.enabled:
            return
        self.state.enabled = enabled
        if enabled:
            self._settle()
        for host in self._merged_hosts if enabled else reversed(self._merged_hosts):
            host.sync()
            host.original = host.exchange(host.original or {})
        if self._merged_hosts:
            self._sync()
        if not enabled:
            self._settle()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within: exactly the base model."""
        before = self.state.enabled
        self.set_enabled(False)
        try:
            yield
        finally:
            self.set_enabled(before)

    def _settle(self) -> None:
        """Have the base weight in place that the active adapters' starts were made for."""
        for host in self._split_hosts:
            wanted = [n for n in self.state.active if n in host.adapters and host.adapters[n].residual is not None]
            if len(wanted) > 1:
                raise ValueError(
                    f"The adapters {' and '.join(wanted)} each replaced the base weight of '{host.site.path}' at their "
                    "start, so they cannot be active together; convert them to plain LoRA first."
                )
            host.lend(host.adapters[wanted[0]].residual if wanted and self.state.enabled else None)

    def refresh(self, name: str | None = None) -> None:
        """Take note of tensors that took the place of others in an adapter (default: in any) planted before."""
        for host in self.hosts(name):
            if host.twins is not None:
                host.settle()
            chosen = host.adapters.values() if name is None else (host.adapters[name],)
            if any(adapter.residual is not None for adapter in chosen) and host not in self._split_hosts:
                self._split_hosts.append(host)
        self.state.renew()
        self._settle()

    def route(self, names: Sequence[str] | None) -> None:
        """One adapter name per row of the batches to come (``"__base__"``: none), until the next call of ``route``.

        Raises:
            ValueError: an unknown name, or a merged model.
        """
        if names is not None and tuple(names) == self.state.route:
            return
        if names is not None:
            self._require(*(n for n in dict.fromkeys(names) if n != BASE))
            if self._merged_hosts:
                raise ValueError("A mixed batch needs unmerged adapters: call unmerge_adapter() first.")
            for name in dict.fromkeys(names):
                if any(h.adapters[name].residual is not None for h in self._hosts.get(name, ())):
                    raise ValueError(
                        f"Adapter '{name}' replaced base weights at its start, so it cannot share a batch; convert it "
                        "to plain LoRA first."
                    )
        if names is not None or self.state.route is not None:
            self.state.send(names)

    # ---- merging ----------------------------------------------------------------------------------------------------
    def merge(
        self, *names: str, check: bool = True, keep: torch.device | str | None = None, quantized: Way | None = None
    ) -> MergeReport:
        """Fold adapters (default: the active ones) into new base parameters. All layers or none.

        Args:
            names: adapters, in the order in which they are folded.
            check: refuse results that are not finite.
            keep: device that holds the original parameters meanwhile; default: where they are.
            quantized: what becomes of packed layers: "dequantize" (the default) makes them dense, "requantize" packs
                the sum again, a mapping path -> weight (out, in) puts the sum with these original weights in.

        Returns:
            What was done at packed layers, with the measured error; also given as a warning where there are any.

        Raises:
            ValueError: an unknown name, an adapter whose effect is no weight, or a result that is not finite.
        """
        way = chosen_way(quantized)
        losses: dict[str, Loss] = {}
        chosen = names or self.state.active
        self._require(*chosen)
        prompts = [n for n in chosen if n in self.prompts]
        if prompts:
            raise ValueError(f"'{prompts[0]}' is a prompt, which has no weight to merge into.")
        weighing = [n for n in chosen if n in self.roots]
        if weighing:
            raise ValueError(f"'{weighing[0]}' weighs its adapters by the input, so they cannot be merged with it.")
        todo = [h for h in self._all_hosts(innermost_first=True) if any(n in h.adapters for n in chosen)]
        for host in todo:
            if any(is_cut(p) for p in host.site.module._parameters.values() if p is not None):
                raise ValueError(
                    f"The weight of '{host.site.path}' is sharded between processes, so nothing can be merged into it; "
                    "save the adapter, and merge it in one process."
                )
        for host in todo:
            for name in chosen:
                if name not in host.adapters:
                    continue
                adapter = host.adapters[name]
                if not adapter.mergeable and adapter.replacement() is None:
                    weight = torch.empty(0) if host.site.kind == "opaque" else host.site.weight
                    adapter.merged(weight, host.site.bias)  # says why it refuses
        done: list[tuple[Adapted, tuple[str, ...]]] = []
        try:
            for host in todo:
                mergeable = [n for n in chosen if n in host.adapters and host.adapters[n].replacement() is None]
                if mergeable:
                    before = host.merged_names
                    host.sync()
                    loss = host.fold_in(mergeable, check=check, keep=keep, way=way)
                    done.append((host, before))
                    losses |= {host.site.path: loss} if loss is not None else {}
        except BaseException:
            for host, before in reversed(done):
                host.fold_out()
                host.fold_in(before, check=False, keep=keep, way=way)
            self._sync()
            raise
        self._merged_hosts = [h for h in self._all_hosts(innermost_first=True) if h.merged_names]
        self._sync()
        report = MergeReport(tuple(chosen), way, losses)
        if losses:
            warnings.warn(str(report), stacklevel=2)
        return report

    def unmerge(self) -> None:
        """Put the very parameter objects back that were there before ``merge``."""
        if not self._merged_hosts:
            return
        for host in reversed(self._merged_hosts):
            host.fold_out()
        self._merged_hosts = []
        self._sync()

    def _sync(self) -> None:
        for host in self._all_hosts():
            host.sync()

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are merged now."""
        return tuple(dict.fromkeys(n for host in self._merged_hosts for n in host.merged_names))

    # ---- training ---------------------------------------------------------------------------------------------------
    def penalty(self) -> Tensor | None:
        """The sum of the active adapters' terms for the loss, or None."""
        terms = [
            term
            for name in self.state.active
            for host in self._hosts.get(name, ())
            if (term := host.adapters[name].penalty()) is not None
        ]
        if not terms:
            return None
        lead = terms[0]
        return torch.stack([t.to(lead.device, torch.float32) for t in terms]).sum()

    def after_step(self, step: int) -> None:
        """Tell the active methods that optimiser step number ``step`` (from 1) was taken; gradients are still there."""
        for name in self.state.active:
            build = registry.of(str(self.configs[name].peft_type)).build
            if issubclass(build, Adapter):
                build.after_step(self.configs[name], dict(self.adapters(name)), step)
