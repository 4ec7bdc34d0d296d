"""Modules by their paths in the base model, as they were before any adapter stood around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn


def original(module: nn.Module) -> nn.Module:
    """The layer itself, below any adapters around it."""
    while getattr(type(module), "is_adapted", False):
        module = cast(nn.Module, module.base_layer)
    return module


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below ``model`` with its path, once and in order; adapted layers appear as the layers they were."""
    seen: set[int] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        module = original(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        if path:
            yield path, module
        if children := module._modules:
            dot = path + "." if path else ""
            stack += [(dot + name, child) for name, child in reversed(children.items()) if child is not None]


class Places:
    """Looks modules up by their paths, each once."""

    def __init__(self, model: nn.Module):
        self.found = {"": original(model)}

    def __getitem__(self, path: str) -> nn.Module:
        """The module at a path, below any adapters around it."""
        found = self.found.get(path)
        if found is None:
            place, _, leaf = path.rpartition(".")
            found = self.found[path] = original(cast(nn.Module, self[place]._modules[leaf]))
        return found
