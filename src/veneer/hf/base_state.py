"""The base model's own state dict, under the names it had before it was adapted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.core.patterns import nearest
from veneer.engine.targets import original, walk
from veneer.engine.tuner import Tuner
from veneer.hf.state_dict import tuner_of


class Keys(NamedTuple):
    """What did not fit, as ``load_state_dict`` reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors as they were before any adapter: unmerged, and without the adapters' own.

    Raises:
        ValueError: the model has no adapters.
    """
    return {key: tensor.detach() for key, tensor in _tensors(tuner_of(model))}


def set_base_model_state_dict(model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> Keys:
    """Copy tensors under the base's own names into an adapted model; a merge in force still stands for the old ones.

    Raises:
        RuntimeError: with ``strict``, a missing or unexpected key; nothing is changed then.
        ValueError: the model has no adapters, or a tensor of another shape.
    """
    own = dict(_tensors(tuner_of(model)))
    keys = Keys([k for k in own if k not in state_dict], [k for k in state_dict if k not in own])
    if strict and any(keys):
        near = nearest(keys.unexpected_keys[0], own, 1) if keys.unexpected_keys else []
        hint = f" ('{keys.unexpected_keys[0]}' looks like '{near[0]}')" if near else ""
        raise RuntimeError(
            f"The state dict does not fit the base model: {len(keys.missing_keys)} keys are missing "
            f"({', '.join(keys.missing_keys[:3])}), {len(keys.unexpected_keys)} are unexpected{hint}."
        )
    for key, value in state_dict.items():
        if key in own and own[key].shape != value.shape:
            raise ValueError(f"'{key}' has shape {tuple(value.shape)}, but the base model's {tuple(own[key].shape)}.")
    with torch.no_grad():
        for key, value in state_dict.items():
            if key in own:
                own[key].copy_(value)
    return keys


def _tensors(tuner: Tuner) -> Iterator[tuple[str, Tensor]]:
    """(name before wrapping, the base's own tensor), in the order of the model."""
    aside: dict[
        tuple[int, str], Tensor | None
    ] = {}  # what a merge, or an adapter's start, has put another parameter in the place of
    for host in tuner.hosts():
        for kept in (host.lent, host.original):
            for name, parameter in (kept or {}).items():
                owner, leaf = host.site._owner(name)
                aside.setdefault((id(owner), leaf), parameter)
    for path, module in [("", original(tuner.model)), *walk(tuner.model)]:
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            tensor = aside.get((id(module), name), tensor)
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor
