"""Which adapters are on, which of them train, and which rows of a batch they serve."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from veneer.core import lean
from veneer.engine.adapted import BASE
from veneer.engine.holding import Inside
from veneer.engine.merging import Merging


class Choosing(Merging):
    """What of a tuner switches."""

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
        inside = self._inside(name)
        for table in inside.parameters:
            for parameter in table.values():
                if parameter is not None and parameter.requires_grad is not on:
                    parameter.requires_grad_(on)
        for module in inside.adapters if on else ():
            for key in getattr(module, "fixed", ()):
                module.get_parameter(key).requires_grad_(False)
        (self._training.add if on else self._training.discard)(name)

    def _inside(self, name: str) -> Inside:
        """What an adapter consists of, found again if something has come or gone."""
        hosts, kept = self._hosts[name], self._found.get(name)
        if kept is not None and kept.hosts is hosts and kept.planted == len(hosts):
            if kept.settled == self.state.settled and all(len(table) == n for table, n in kept.children):
                return kept
        own: list[nn.Module] = [host._modules["adapters"]._modules[name] for host in hosts]
        own += [table[name] for table in (self.shared, self.prompts) if name in table]
        found = dict.fromkeys(module for one in own for module in lean.inside(one))
        parameters = [module._parameters for module in found]
        children = [(module._modules, len(module._modules)) for module in found]
        self._found[name] = Inside(own, parameters, children, hosts, len(hosts), self.state.settled)
        return self._found[name]

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

        What was written into the adapters' tensors before this call, those batches see for sure; what is written
        after it, under the same route, perhaps not.

        Raises:
            ValueError: an unknown name, or a merged model.
        """
        if names is not None and tuple(names) == self.state.route:
            self.state.look()
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
