"""From a few folders of trained LoRAs to a mixture of them, in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from veneer.engine.combine import RULES
from veneer.hf.experts import Expert, read
from veneer.hf.lorahub import search
from veneer.hf.model import PeftModel
from veneer.hf.state_dict import tuner_of
from veneer.hf.tasks import get_peft_model
from veneer.methods.lora_config import LoraConfig
from veneer.methods.lora_options import ArrowConfig
from veneer.methods.mole import Mole, MoleConfig
from veneer.methods.xlora import XLoraConfig


def mix(
    model: nn.Module,
    adapters: Mapping[str, str | Path],
    method: str = "mole",
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """A model that mixes trained LoRAs; only what weighs them trains.

    Args:
        model: the base model that all of them were trained on; wrapped in place.
        adapters: a name for each LoRA -> its folder or hub id.
        method: "mole" (a gate per layer, trained), "xlora" (one classifier, trained), "arrow" (no training),
            "lorahub" (weights searched by ``loss``; the result is one plain LoRA), or a rule of
            ``add_weighted_adapter`` ("cat", "linear", "svd", "ties", "dare_ties", ...; the same, without a search).
        adapter_name: the mixture's name.
        options: fields of ``MoleConfig``, ``XLoraConfig`` or ``ArrowConfig``; for "arrow" also ``general={name:
            folder}``; for "lorahub" the arguments of ``veneer.hf.lorahub.search``; for a rule ``weights`` (default: one
            divided by the number of adapters, each) and its own options (``density``, ``svd_rank``, ...).

    Raises:
        ValueError: an unknown method, adapters that are no plain LoRA, or ones of different bases.
    """
    make = METHODS.get(method)
    if make is None and method in RULES:
        make = partial(_combined, rule=method)
    if make is None:
        raise ValueError(f"Unknown method '{method}'; LoRAs are mixed by {', '.join([*METHODS, *RULES])}.")
    return make(model, read(adapters), adapter_name, options)


# ---- one function a method ----------------------------------------------------------------------------------------
def _mole(model: nn.Module, experts: dict[str, Expert], name: str, options: dict[str, Any]) -> PeftModel:
    first = next(iter(experts.values())).config
    adapters = {expert: str(e.folder) for expert, e in experts.items()}
    return get_peft_model(model, MoleConfig(adapters=adapters, task_type=first.task_type, **options), name)


def _xlora(model: nn.Module, experts: dict[str, Expert], name: str, options: dict[str, Any]) -> PeftModel:
    first = next(iter(experts.values())).config
    adapters = {expert: str(e.folder) for expert, e in experts.items()}
    return get_peft_model(model, XLoraConfig(adapters=adapters, task_type=first.task_type, **options), name)


def _arrow(model: nn.Module, experts: dict[str, Expert], name: str, options: dict[str, Any]) -> PeftModel:
    options = dict(options)
    general = read(options.pop("general")) if options.get("general") else {}
    return arrow(model, experts, general, ArrowConfig(**{"use_gks": bool(general)} | options), name)


def arrow(
    model: nn.Module,
    experts: dict[str, Expert],
    general: dict[str, Expert],
    config: ArrowConfig,
    name: str,
    **loading: Any,
) -> PeftModel:
    """The experts and the general adapters under their names, and Arrow's router under ``name``, active.

    Raises:
        ValueError: ``use_gks`` without general adapters, or names that both lists hold.
    """
    twice = sorted(experts.keys() & general.keys())
    if twice:
        raise ValueError(f"'{twice[0]}' names both a task's and a general adapter; give one of them another name.")
    if config.top_k > len(experts) and config.top_k != ArrowConfig().top_k:
        raise ValueError(f"top_k={config.top_k} is above the number of experts, {len(experts)}.")
    if config.use_gks and not general:
        raise ValueError("ArrowConfig(use_gks=True) needs general adapters to subtract: give general_adapter_paths.")
    if name in experts | general:
        raise ValueError(f"The mixture itself is called '{name}'; give the adapter of this name another one.")
    whole = _loaded(model, experts | general, **loading)
    config = copy.copy(config)
    config.task_adapter_names, config.gks_adapter_names = list(experts), list(general)
    first = next(iter(experts.values())).config
    named: set[str] = set()
    for expert in experts:
        named |= {place for place, _ in whole.base_model.adapters(expert)}
    router = LoraConfig(r=first.r, target_modules=sorted(named), arrow_config=config, task_type=first.task_type)
    whole.add_adapter(name, router)
    whole.set_adapter(name)
    return whole


def _loaded(model: nn.Module, experts: dict[str, Expert], **loading: Any) -> PeftModel:
    """The model with every expert in it under its own name."""
    (first, lead), *others = experts.items()
    whole = PeftModel.from_pretrained(model, lead.folder, adapter_name=first, **loading)
    try:
        for name, e in others:
            whole.load_adapter(e.folder, name, **loading)
    except BaseException:
        whole.base_model.unload()
        raise
    return whole


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model that routes each token over trained LoRAs without any training.

    Args:
        base_model: the model that all of them were trained on.
        task_specific_adapter_paths: folders or hub ids; the adapters get the names ``task_0``, ``task_1``, ...
        arrow_config: how many experts a token uses, and how evenly.
        general_adapter_paths: LoRAs of general knowledge, subtracted where ``arrow_config.use_gks``.
        adapter_kwargs: passed on to the loading of each adapter.

    Raises:
        ValueError: no paths, adapters that are no plain LoRA, or ones of different bases.
    """
    experts = read({f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)})
    named = {f"gks_{i}": path for i, path in enumerate(general_adapter_paths or ())}
    general = read(named) if named else {}
    return arrow(base_model, experts, general, arrow_config, "arrow_router", **adapter_kwargs)


def _lorahub(model: nn.Module, experts: dict[str, Expert], name: str, options: dict[str, Any]) -> PeftModel:
    return search(model, experts, name, **options)


def _combined(model: nn.Module, experts: dict[str, Expert], name: str, options: dict[str, Any], rule: str) -> PeftModel:
    weights = list(options.pop("weights", None) or [1 / len(experts)] * len(experts))
    if len(weights) != len(experts):
        raise ValueError(f"weights has {len(weights)} entries for {len(experts)} adapters; give one for each.")
    members = {f"mixed_{expert}": e for expert, e in experts.items()}  # a member may be called as the result is
    whole = _loaded(model, members)
    try:
        whole.add_weighted_adapter(list(members), weights, name, rule, **options)
    except BaseException:
        whole.base_model.unload()
        raise
    for member in members:
        whole.delete_adapter(member)
    whole.set_adapter(name)
    return whole


METHODS: dict[str, Callable[[nn.Module, dict[str, Expert], str, dict[str, Any]], PeftModel]] = {
    "mole": _mole,
    "xlora": _xlora,
    "arrow": _arrow,
    "lorahub": _lorahub,
}


# ---- using one ------------------------------------------------------------------------------------------------------
def keep_experts(model: nn.Module, names: Iterable[str], adapter_name: str = "default") -> None:
    """Have a MoLE mixture use these experts alone, its gates renormalised over them; without training anew.

    Raises:
        ValueError: an unknown expert, none, or an adapter that is no MoLE.
    """
    wanted = list(names)
    for place, adapter in tuner_of(model).adapters(adapter_name):
        if not isinstance(adapter, Mole):
            raise ValueError(f"'{adapter_name}' is a {type(adapter).__name__} at '{place}'; keep_experts needs a MoLE.")
        adapter.keep(wanted)
