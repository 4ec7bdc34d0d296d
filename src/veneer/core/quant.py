"""Packed weight <-> dense weight: one row a back end, none of which a method ever names.

A row says how to recognise a module, how to unpack its weight, and how to put a dense weight back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Backend:
    """How one library stores a weight."""

    name: str
    matches: Callable[[nn.Module], bool]
    dense: Callable[[nn.Module], Tensor]
    """module -> its weight, unpacked, in the module's own layout."""
    packed: Callable[[nn.Module, Tensor], dict[str, nn.Parameter | None]]
    """(module, dense weight) -> the parameters that store it."""
    compute_dtype: Callable[[nn.Module], torch.dtype]


BACKENDS: list[Backend] = []


def backend(module: nn.Module) -> Backend | None:
    """The row that stores this module's weight, or None for a plain float weight."""
    for row in BACKENDS:
        if row.matches(module):
            return row
    return None


def dense(module: nn.Module, stored: Tensor) -> Tensor:
    """The weight as an ordinary float tensor, in the module's own layout."""
    if type(stored) is nn.Parameter and stored.is_floating_point():
        return stored
    row = backend(module)
    if row is not None:
        return row.dense(module)
    if stored.is_floating_point():
        return stored
    raise ValueError(
        f"A {type(module).__name__} holds its weight as {stored.dtype}, and no quantisation back end here knows how to "
        "read it; use a method that does not read the weight."
    )


def packed(module: nn.Module, name: str, weight: Tensor) -> dict[str, nn.Parameter | None]:
    """The parameters that store ``weight`` in this module."""
    row = backend(module)
    if row is not None:
        return row.packed(module, weight)
    return {name: nn.Parameter(weight, requires_grad=False)}


def compute_dtype(module: nn.Module, stored: Tensor) -> torch.dtype:
    """The dtype a layer computes in: its weight's, or its back end's for a packed weight."""
    if stored.is_floating_point() and type(stored) is nn.Parameter:
        return stored.dtype
    row = backend(module)
    if row is not None:
        return row.compute_dtype(module)
    return stored.dtype if stored.is_floating_point() else torch.float32
