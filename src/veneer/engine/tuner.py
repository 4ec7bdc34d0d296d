"""The tuner: adds adapters to a model, renames them, and takes them out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.core import lean, registry
from veneer.core.adapter import Additive
from veneer.core.config import PeftConfig
from veneer.core.root import Root
from veneer.core.sites import Site
from veneer.engine import blueprint, root
from veneer.engine.adapted import BASE
from veneer.engine.packed_merge import Way
from veneer.engine.places import Places
from veneer.engine.planting import Planting


class Tuner(Planting):
    """A base model with named adapters in it.

    Args:
        model: the base; its layers are wrapped in place, its parameters are frozen at the first ``add``.

    Attributes:
        configs: adapter name -> its config.
        state: the switchboard that every wrapper of this model reads.
    """

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
        drawn = self._drawn(config, device, autocast_adapter_dtype, only)
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
        self._enter(name, config, drawn)
        self._join(around)
        return drawn.own

    def _drawn(
        self, config: PeftConfig, device: torch.device | str | None, autocast: bool, only: set[str] | None
    ) -> blueprint.Blueprint:
        """One adapter, built and where it belongs, but not planted yet."""
        with self.disabled():  # a start reads the base's own weights
            build = registry.of(str(config.peft_type)).build
            if issubclass(build, Root):
                drawn = root.draw(self, build, config)
            else:
                drawn = blueprint.draw(self.model, config, self.inputs, only)
            for site, adapter in drawn.pairs:
                blueprint.placed(adapter, site, device, autocast and not adapter.keeps_dtype)
                adapter.ready()
        self._accept(drawn.pairs, config)
        merged = {host.site.path: host for host in self._merged_hosts}
        for site, _ in drawn.pairs:
            if site.path in merged:
                names = ", ".join(merged[site.path].merged_names)
                raise ValueError(f"'{site.path}' is merged ({names}); unmerge before adding an adapter there.")
        return drawn

    def _enter(self, name: str, config: PeftConfig, drawn: blueprint.Blueprint) -> None:
        """Note what has been planted, with the switchboard too; it is off and does not train."""
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

    def _accept(self, pairs: blueprint.Pairs, config: PeftConfig) -> None:
        """Refuse, by a ValueError, what has been drawn; a floor above may know more about the model's code."""

    def _free(self, name: str) -> None:
        for governor, module in self.roots.items():
            if name in module.members:
                raise ValueError(f"'{governor}' mixes the adapter '{name}'; delete '{governor}' first.")

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
        self._found.pop(name, None)
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
