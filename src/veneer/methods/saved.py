"""modules_to_save: a full trained copy of a module (a new head, say), kept beside the frozen original."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from veneer.core.adapter import Adapter
from veneer.core.registry import auxiliary
from veneer.core.sites import OpaqueSite, Site


@auxiliary("modules_to_save")
class Saved(Adapter):
    """Runs a trained copy in the module's place; the copy's own keys are the keys on disk."""

    keeps_dtype = True
    whole_modules = True

    @classmethod
    def sites(cls, model: nn.Module, config: Any, own: Sequence[Site], find_named: Callable) -> list[Site]:
        """Where ``config.modules_to_save`` asks for copies."""
        found = find_named(model, config.modules_to_save, what="modules_to_save")
        paths = {t.path for t in found}
        outer = [t for t in found if not any(t.path.startswith(p + ".") for p in paths)]
        sites: list[Site] = [OpaqueSite(t.path, t.module) for t in outer]
        if config.ensure_weight_tying:
            sites += [_Follower(path, module, site) for site in list(sites) for path, module in tied(model, site)]
        return sites

    @classmethod
    def on(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Adapter:
        if isinstance(site, _Follower):
            return TiedCopy(site, site.leader.adapter)
        adapter = cls(site, config)
        site.adapter = adapter  # type: ignore[attr-defined]
        return adapter

    def __init__(self, site: Site, config: Any):
        super().__init__(site, config)
        self.copy = copy.deepcopy(site.module)
        for parameter in self.copy.parameters():
            parameter.requires_grad_(True)

    @property
    def holder(self) -> nn.Module:
        return self.copy

    def replacement(self) -> nn.Module:
        return self.copy


class TiedCopy(Adapter):
    """A layer tied to a copied one: runs with the copy's weight, owns nothing."""

    keeps_dtype = True

    def __init__(self, site: Site, leader: Saved):
        super().__init__(site, None)
        object.__setattr__(self, "leader", leader)

    def overrides(self) -> dict:
        return {"weight": self.leader.copy.weight}


class _Follower(OpaqueSite):
    def __init__(self, path: str, module: nn.Module, leader: Site):
        super().__init__(path, module)
        self.leader = leader


def tied(model: nn.Module, site: Site) -> list[tuple[str, nn.Module]]:
    """(path, module) of the other layers that hold this site's very weight object."""
    weight = getattr(site.module, "weight", None)
    return [
        (path, module)
        for path, module in model.named_modules()
        if module is not site.module and weight is not None and module._parameters.get("weight") is weight
    ]
