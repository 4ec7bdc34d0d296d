"""Modules made and walked without what torch's own ways do besides: it counts where there are thousands of them."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def unswept() -> Iterator[None]:
    """Within: Python does not look for garbage, of which many new objects would make it think there must be some."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


_UNUSED = nn.Module().__dict__
"""The attributes of a module that nothing has been done to."""
_TABLES = [(name, type(value)) for name, value in _UNUSED.items() if isinstance(value, dict | set)]


def begin(module: nn.Module) -> None:
    """``nn.Module.__init__``: the same attributes, set all at once instead of one by one."""
    own = module.__dict__
    own.update(_UNUSED)
    for name, table in _TABLES:
        own[name] = table()


def module_dict() -> nn.ModuleDict:
    """An empty ``nn.ModuleDict``."""
    new = nn.ModuleDict.__new__(nn.ModuleDict)
    begin(new)
    return new


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free linear layer whose weight is still to be written; torch would draw one that is drawn anew anyway."""
    layer = nn.Linear.__new__(nn.Linear)
    begin(layer)
    layer.__dict__.update(in_features=in_features, out_features=out_features)
    layer._parameters.update(weight=nn.Parameter(torch.empty(out_features, in_features)), bias=None)
    return layer


def inside(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all that is in it, each once, in no order that counts."""
    left, seen = [module], set()
    while left:
        module = left.pop()
        if module not in seen:
            seen.add(module)
            yield module
            left += [child for child in module._modules.values() if child is not None]


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module and of all that is in it."""
    for each in inside(module):
        for table in (each._parameters, each._buffers):
            yield from (tensor for tensor in table.values() if tensor is not None)


def empty(module: nn.Module, dtype: torch.dtype) -> None:
    """``module.to("meta", dtype)``, for plain parameters."""
    for each in inside(module):
        for name, tensor in each._parameters.items():
            if tensor is not None:
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                new = torch.empty_like(tensor, dtype=kind, device="meta")
                each._parameters[name] = nn.Parameter(new, tensor.requires_grad)


def arguments(model: nn.Module) -> Sequence[str]:
    """The names that ``model.forward`` takes."""
    forward = model.forward
    own = getattr(forward, "__func__", None)
    return _names(own)[1:] if own is not None else tuple(inspect.signature(forward).parameters)


@functools.cache
def _names(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


_PLAIN = ("state_dict", "_save_to_state_dict", "get_extra_state")


def saved(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """``module.state_dict(keep_vars=True)``: the live tensors that are saved, by their keys."""
    kind = type(module)
    hooked = module._state_dict_hooks or module._state_dict_pre_hooks
    if hooked or any(getattr(kind, way) is not getattr(nn.Module, way) for way in _PLAIN):
        return module.state_dict(prefix=prefix, keep_vars=True)
    found: dict[str, Tensor] = {prefix + key: own for key, own in module._parameters.items() if own is not None}
    for key, buffer in module._buffers.items():
        if buffer is not None and key not in module._non_persistent_buffers_set:
            found[prefix + key] = buffer
    for key, child in module._modules.items():
        if child is not None:
            found |= saved(child, f"{prefix}{key}.")
    return found
