"""Another adapter's weights into the place of one that runs, without touching the model: nothing is compiled again.

``prepare_model_for_compiled_hotswap`` makes room first: ranks are filled up with zeros to the largest that will come,
and the scalings become tensors, so that a swap is a copy into tensors that a compiled graph reads anyway.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.config import PeftConfig
from veneer.engine.checkpoint import PREFIX, read
from veneer.engine.tuner import Tuner
from veneer.hf import hub, shown
from veneer.hf.state_dict import tuner_of
from veneer.methods.lora import Lora

MUST_AGREE = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")
"""Settings of two LoRAs that a swap cannot change."""
KEYS_TO_CHECK = {"LORA": list(MUST_AGREE)}
RANK_AT = {"lora_A.weight": 0, "lora_B.weight": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""The dimension of a tensor that counts the rank."""


class HotswapError(ValueError, RuntimeError):
    """Tensors that have no place in the adapter that they are to replace."""


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put a saved LoRA into the place of one that is loaded: its weights, its scaling and its config.

    Args:
        model: a PeftModel, or a model that adapters were injected into; compiled or not.
        model_name_or_path: an adapter's folder, or a hub id.
        adapter_name: the adapter whose place it takes.
        torch_device: taken for callers of the peer; tensors go where the ones before them are.
        kwargs: ``subfolder``, ``revision``, ``token``, ``key_mapping``, ...

    Raises:
        ValueError: the two do not fit into one place; nothing is changed then.
        FileNotFoundError: there is no such adapter.
    """
    folder = hub.resolve(model_name_or_path, kwargs.get("subfolder"), **hub.arguments(kwargs))
    tensors = hub.renamed(read(folder), kwargs.get("key_mapping"))
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, PeftConfig.read(folder))


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Put tensors under file keys (or under the live names) into the place of a loaded LoRA.

    Layers that the new adapter lacks are silenced; layers that the loaded one lacks are refused.

    Args:
        model: see ``hotswap_adapter``.
        state_dict: the new tensors, of any rank (without room for it, the tensors are replaced).
        adapter_name: the adapter whose place it takes.
        config: the new adapter's settings.
        parameter_prefix: what the tensors' names start with.

    Raises:
        HotswapError: tensors without a place.
        ValueError: the adapter is merged, or the settings do not agree. Nothing is changed then.
    """
    tuner = tuner_of(_uncompiled(model))
    if adapter_name not in tuner.configs:
        raise HotswapError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: there is no adapter '{adapter_name}' to "
            f"take the place of; this model has {', '.join(tuner.configs) or 'none'}."
        )
    if any(adapter_name in host.merged_names for host in tuner.hosts(adapter_name)):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights; call "
            "unmerge_adapter() first."
        )
    check_hotswap_configs_compatible(tuner.configs[adapter_name], config)
    fits = _fitted(tuner, adapter_name, state_dict, config)
    for adapter, tensors, own in fits:
        _swap(adapter, tensors, own)
    new = copy.deepcopy(config)
    new.inference_mode = tuner.configs[adapter_name].inference_mode
    tuner.configs[adapter_name] = new
    tuner.refresh()


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse two configs whose adapters cannot take each other's place.

    Raises:
        ValueError: other methods than LoRA, or settings that a swap cannot change.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}.")
    if str(config0.peft_type) != "LORA":
        raise ValueError(f"Hotswapping only supports LORA but {config0.peft_type} was passed.")
    for key in MUST_AGREE:
        a, b = getattr(config0, key), getattr(config1, key)
        if a != b:
            raise ValueError(f"Configs are incompatible: for {key}, {a} != {b}.")


def prepare_model_for_compiled_hotswap(
    model: nn.Module, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Make room for adapters to come; call it with the first adapter loaded, before ``torch.compile``.

    Args:
        model: a PeftModel, or a model that LoRAs were injected into.
        target_rank: the largest rank that will come; None: only make the scalings tensors.
        config: an adapter's config, or a dict of them, whose ``rank_pattern`` says other ranks for some layers.
        check_compiled: what to do with a model that is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: no LoRA in the model, a rank that is larger than ``target_rank``, or the model is compiled.
    """
    _judge_compiled(model, check_compiled)
    model = _uncompiled(model)
    found = [(host, a) for host in _hosts(model) for a in host.adapters.values() if isinstance(a, Lora)]
    if not found:
        raise ValueError(
            "No adapter layers found on the model, make sure to call `prepare_model_for_compiled_hotswap` after "
            "loading the first adapter and before loading the second adapter."
        )
    configs = list(config.values()) if isinstance(config, dict) else [config] if config is not None else []
    rooms = [_room(host.site.path, target_rank, configs) for host, _ in found]
    for (_, adapter), room in zip(found, rooms, strict=True):
        if room is not None and room < adapter.r:
            raise ValueError(
                f"Trying to pad the adapter to the target rank {room}, but the original rank is larger ({adapter.r}). "
                "This is not possible."
            )
    for (_, adapter), room in zip(found, rooms, strict=True):
        if room is not None and room > adapter.r:
            _make_room(adapter, room)
        if not isinstance(adapter.scaling, Tensor):
            adapter.scaling = torch.tensor(float(adapter.scaling))
    tuner_of(model).refresh()


def _room(path: str, target_rank: int | None, configs: list[Any]) -> int | None:
    """The rank that the layer at ``path`` needs room for."""
    own = [c.at(path).r for c in configs if getattr(c, "rank_pattern", None) and c.at(path).r != c.r]
    return max(own) if own else target_rank


# ---- tensors of another rank ---------------------------------------------------------------------------------------
def _of_rank(adapter: Any, key: str, value: Tensor, rank: int) -> Tensor:
    """A factor cut or filled up with zeros to ``rank``, group by group where the layer has groups."""
    if key not in RANK_AT:
        return value
    groups = getattr(getattr(adapter, "lora_A", None), "groups", 1)
    parts = value.unflatten(0, (groups, -1)) if RANK_AT[key] == 0 else value
    own, wanted = parts.shape[1], rank // groups
    if own > wanted:
        parts = parts[:, :wanted]
    elif own < wanted:
        parts = torch.cat([parts, parts.new_zeros(parts.shape[0], wanted - own, *parts.shape[2:])], dim=1)
    return (parts.flatten(0, 1) if RANK_AT[key] == 0 else parts).contiguous()


def _room_in(adapter: Any) -> int:
    """The rank that an adapter's tensors have room for."""
    return adapter.factors()[0].shape[0]


def _make_room(adapter: Any, rank: int) -> None:
    """Give a LoRA's tensors another rank; what is written to its file keeps the rank that it has."""
    for key, live in adapter.holder.state_dict(keep_vars=True).items():
        path, _, leaf = key.rpartition(".")
        new = _of_rank(adapter, key, live.detach(), rank)
        adapter.holder.get_submodule(path)._parameters[leaf] = nn.Parameter(new, live.requires_grad)
    for part, names in (
        ("lora_A", ("out_features", "out_channels")),
        ("lora_B", ("in_features", "in_channels")),
    ):
        module = getattr(adapter, part, None)
        for name in names:
            if hasattr(module, name):
                setattr(module, name, rank)
    adapter.__dict__["outgoing"] = functools.partial(_written, adapter)


def _written(adapter: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``outgoing`` of an adapter with room to spare: without it."""
    own = {key: _of_rank(adapter, key, value, adapter.r) for key, value in tensors.items()}
    return type(adapter).outgoing(adapter, own)


def _fitted(tuner: Tuner, name: str, given: dict[str, Tensor], config: Any) -> list[tuple[Any, dict[str, Tensor], Any]]:
    """(adapter, its new tensors, its new settings) of every layer, nothing written yet."""
    left = {key.removeprefix(PREFIX): value for key, value in given.items()}
    found, mismatched = [], []
    for place, adapter in tuner.adapters(name):
        if not isinstance(adapter, Lora) or adapter.site.stack:
            raise HotswapError(
                f"'{place}' holds a {type(adapter).__name__}{' of experts' if adapter.site.stack else ''}, and only "
                "LoRA on linear layers, convolutions and embeddings can be swapped in place; load the adapter beside "
                "it."
            )
        own = {}
        for key in adapter.holder.state_dict():
            for shown_as in (f"{place}.{key}", f"{place}.{shown.leaf_name(name, key)}"):
                if shown_as in left:
                    own[key] = left.pop(shown_as)
        at = config.at(place)
        own = adapter.incoming(own)
        for key, live in adapter.holder.state_dict().items():
            wanted = _of_rank(adapter, key, live, at.r).shape
            if key in own and own[key].shape != wanted:
                mismatched.append(f"{place}.{key}: {tuple(own[key].shape)} instead of {tuple(wanted)}")
        found.append((adapter, own, at))
    if left:
        raise HotswapError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(sorted(left)[:4])}. The "
            "loaded adapter has no such layers; load first the one that has the most."
        )
    if mismatched:
        raise HotswapError(f"Hot swapping the adapter did not succeed, size mismatch: {'; '.join(mismatched[:4])}.")
    return found


def _swap(adapter: Any, tensors: dict[str, Tensor], config: Any) -> None:
    """Write new tensors into one layer's adapter; a tensor that the new one lacks becomes zero."""
    if config.r > _room_in(adapter):
        _make_room(adapter, config.r)
    room = _room_in(adapter)
    adapter.r, adapter.lora_alpha = config.r, config.lora_alpha
    if room != config.r:
        adapter.__dict__["outgoing"] = functools.partial(_written, adapter)
    with torch.no_grad():
        for key, live in adapter.holder.state_dict(keep_vars=True).items():
            if key in tensors:
                live.copy_(_of_rank(adapter, key, tensors[key].to(live), room))
            else:
                live.zero_()
    if isinstance(adapter.scaling, Tensor):
        adapter.scaling.fill_(config.scaling)
    else:
        adapter.scaling = config.scaling


def _hosts(model: nn.Module) -> Iterator[Any]:
    try:
        yield from tuner_of(model).hosts()
    except ValueError:
        return


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _judge_compiled(model: nn.Module, what: str) -> None:
    if what not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got '{what}' instead.")
    compiled = hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
    if not compiled or what == "ignore":
        return
    if what == "error":
        raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model.")
    warnings.warn(
        "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely result "
        "in re-compilation; call it before compiling.",
        stacklevel=3,
    )
