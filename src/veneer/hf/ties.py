"""Tied parameters in a state dict: one entry for each parameter object, as safetensors wants it.

transformers' Trainer saves the whole state dict of a model whose class it does not know, straight into safetensors,
which refuses two names for one tensor (GPT-2, T5, SmolLM2 and most small models tie their head to their embedding).
"""

from __future__ import annotations

from typing import Any

from torch import nn


def groups(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several, in the order of the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def once(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with the first name of each tied parameter alone."""
    for first, *others in groups(model):
        if first in state:
            for name in others:
                state.pop(name, None)
    return state


def completed(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with every name of each tied parameter that it has under one of them."""
    added: dict[str, Any] = {}
    for group in groups(model):
        known = next((name for name in group if name in state), None)
        if known is not None:
            added |= {name: state[known] for name in group if name not in state}
    return {**state, **added} if added else state
