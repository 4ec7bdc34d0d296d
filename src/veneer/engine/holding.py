"""What a tuner holds, which layers and adapters are in it, and what training asks of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.adapter import Adapter
from veneer.core.config import PeftConfig
from veneer.core.root import Root
from veneer.engine.adapted import Adapted, State, hosts


class Inside(NamedTuple):
    """What an adapter consists of, and where and when that was found."""

    adapters: list[nn.Module]
    """Its own modules: one a wrapper, and what they share."""
    parameters: list[dict[str, Any]]
    """Of these and of all inside them: the tables alone, which are less to go through than the modules."""
    children: list[tuple[dict[str, Any], int]]
    """Likewise, with the number of children."""
    hosts: list[Adapted]
    planted: int
    """How many wrappers there were."""
    settled: int
    """What the switchboard counted."""


class Found(dict[str, Inside]):
    """What was found in a model, by adapter; a copy of the model is to find its own."""

    def __deepcopy__(self, memo: dict) -> Found:
        return Found()

    def __reduce__(self) -> Any:
        return Found, ()


class Holding(nn.Module):
    """A base model, its adapters' configs and the wrappers they sit in; see ``Tuner``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.shared: Any = nn.ModuleDict()
        self.prompts: Any = nn.ModuleDict()
        self.configs: dict[str, PeftConfig] = {}
        self.state = State()
        self.inputs: dict[str, Any] = {}
        self._hosts: dict[str, list[Adapted]] = {}
        self._found = Found()
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

    @property
    def roots(self) -> dict[str, Root]:
        """The adapters that stand at the whole model and govern others."""
        return {name: module for name, module in self.shared.items() if isinstance(module, Root)}

    @property
    def merged(self) -> tuple[str, ...]:
        """Names of the adapters that are merged now."""
        return tuple(dict.fromkeys(n for host in self._merged_hosts for n in host.merged_names))

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
