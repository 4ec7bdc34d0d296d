"""What an adapter will be, built before the model is touched: so a refusal at any layer changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from veneer.core import lean, registry
from veneer.core.adapter import Adapter
from veneer.core.config import PeftConfig
from veneer.core.prompt import Prompt
from veneer.core.sites import OpaqueSite, Site, sites_for
from veneer.engine import targets

Pairs = list[tuple[Site, Adapter]]


@dataclass
class Blueprint:
    """One adapter, ready to be planted: its own sites, every (site, adapter) pair, and what is shared."""

    own: list[Site]
    pairs: Pairs
    shared: nn.Module | None = None
    prompt: Prompt | None = None


def draw(model: nn.Module, config: PeftConfig, inputs: dict[str, Any], only: set[str] | None = None) -> Blueprint:
    """Build everything that one adapter needs.

    Args:
        model: the base model, perhaps with other adapters in it already; read, not changed.
        config: the adapter's settings.
        inputs: the dict that the sites read the current call's inputs from.
        only: keep just the layers with these paths.

    Raises:
        ValueError: a config that matches nothing, or a layer that the method cannot sit at.
    """
    config.check()
    build = registry.of(str(config.peft_type)).build
    if issubclass(build, Prompt):
        return Blueprint([], _auxiliary(model, config, [], inputs), prompt=build.on(model, config))
    own = _sites(model, config, build, only)
    pairs = _auxiliary(model, config, own, inputs)
    copied = [site.path for site, adapter in pairs if adapter.replacement() is not None]
    own = [s for s in own if not any(s.path == p or s.path.startswith(p + ".") for p in copied)]
    if not own:
        raise ValueError("Every layer that target_modules matches lies in modules_to_save; choose others.")
    for site in own:
        site.inputs = inputs
    shared = build.plan(config, own)
    pairs += [(site, build.on(site, config.at(_pattern_path(site)), shared)) for site in own]
    return Blueprint(own, pairs, shared)


def _sites(model: nn.Module, config: PeftConfig, build: type[Adapter], only: set[str] | None) -> list[Site]:
    turned = bool(getattr(config, "fan_in_fan_out", False))
    found: list[Site] = []
    for target in targets.find(model, config):
        if only is not None and target.path not in only:
            continue
        here = [] if build.whole_modules else sites_for(target.path, target.module, target.parameter, turned)
        found += here or [OpaqueSite(target.path, target.module)]
    if not found:
        raise ValueError(f"No layer of {type(model).__name__} was left to adapt.")
    return build.among(config, found)


def _auxiliary(model: nn.Module, config: PeftConfig, own: Sequence[Site], inputs: dict[str, Any]) -> Pairs:
    """The adapters of options that any method may carry; they stand nearest to the layer, so they come first."""
    pairs: Pairs = []
    for option, build in registry.AUXILIARY.items():
        if getattr(config, option, None) in (None, "none", [], {}, False):
            continue
        for site in build.sites(model, config, own, targets.find_named):
            site.inputs = inputs
            pairs.append((site, build.on(site, config)))
    return pairs


def _pattern_path(site: Site) -> str:
    return f"{site.path}.{site.parameter}" if site.kind == "parameter" and not site.below else site.path


class _Place(Protocol):
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


def placed(module: nn.Module, at: _Place, device: torch.device | str | None, autocast: bool) -> nn.Module:
    """Move a fresh module to its layer's device and its dtype: float32, or wider, or the base's where asked for."""
    dtype = torch.promote_types(at.dtype, torch.float32) if autocast else at.dtype
    target = torch.device(device) if device is not None else at.device
    tensors = list(lean.tensors(module))
    if all(t.device == target and (t.dtype is dtype or not t.is_floating_point()) for t in tensors):
        return module
    if target.type == "meta" and device is None:
        return module.to(dtype=dtype)
    if target.type == "meta" and all(type(t) is nn.Parameter for t in tensors):
        lean.empty(module, dtype)
        return module
    return module.to(device=target, dtype=dtype)
