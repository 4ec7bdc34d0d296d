"""Packed weight <-> dense weight: one row a back end (``backends``), none of which a method ever names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.backends import BACKENDS, Backend, Parameters


def backend(module: nn.Module) -> Backend | None:
    """The row that stores this module's weight, or None for a plain float weight."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:
        return None
    for row in BACKENDS:
        if row.matches(module):
            return row
    return None


def stored(module: nn.Module) -> Tensor:
    """The tensor that holds the weight as the layer has it."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    row = backend(module)
    if row is None:
        raise ValueError(f"A {type(module).__name__} has no weight, and no quantisation back end here knows it.")
    return row.stored(module)


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


def packed(module: nn.Module, name: str, weight: Tensor) -> Parameters:
    """The parameters that store ``weight`` in this module.

    Raises:
        ValueError: the module's format cannot be made from a weight alone.
    """
    row = backend(module)
    if row is None:
        return {name: nn.Parameter(weight, requires_grad=False)}
    if row.packed is None:
        raise ValueError(
            f"A weight cannot be packed into the {row.name} form of a {type(module).__name__} again, which its library "
            "makes for whole models; merge into a dequantised base."
        )
    return row.packed(module, weight)


def released(module: nn.Module) -> None:
    """To be called before a module's parameters are exchanged."""
    row = backend(module)
    if row is not None and row.released is not None:
        row.released(module)


class CastLinear(nn.Linear):
    """Computes in its own dtype and answers in that of its input, as the packed layer did whose place it has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def dense_layer(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain layer with these tensors that can stand where a quantised ``module`` stands."""
    row = backend(module)
    kind = CastLinear if row is not None and row.casts else nn.Linear
    layer = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer.train(module.training)


def compute_dtype(module: nn.Module, stored: Tensor) -> torch.dtype:
    """The dtype a layer computes in: its weight's, or its back end's for a packed weight."""
    if stored.is_floating_point() and type(stored) is nn.Parameter:
        return stored.dtype
    row = backend(module)
    if row is not None:
        return row.compute_dtype(module)
    return stored.dtype if stored.is_floating_point() else torch.float32
