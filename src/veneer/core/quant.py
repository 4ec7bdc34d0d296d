"""Packed weight <-> dense weight: one row a back end, none of which a method ever names.

A row says how to recognise a module, how to unpack its weight, and how to put a dense weight back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    if type(stored) is nn.Parameter and stored.is_floating_point() and stored.device.type != "meta":
        return stored
    if stored.device.type == "meta" and (parked := offloaded(module)) is not None:
        return parked["weight"].to(execution_device(module, stored))
    row = backend(module)
    if row is not None:
        return row.dense(module)
    if stored.is_floating_point():
        return stored
    raise ValueError(
        f"A {type(module).__name__} holds its weight as {stored.dtype}, and no quantisation back end here knows how to "
        "read it; use a method that does not read the weight."
    )


def offloaded(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Where accelerate keeps a dispatched module's tensors (name -> tensor) while they are not in use, or None."""
    return getattr(getattr(module, "_hf_hook", None), "weights_map", None)


def execution_device(module: nn.Module, stored: Tensor) -> torch.device:
    """Where the module computes: a dispatched module's tensors may be on the meta device until it is called."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return stored.device if device is None or stored.device.type != "meta" else torch.device(device)


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
