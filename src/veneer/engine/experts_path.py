"""The short way through a module of fused experts: low-rank branches on the routed tokens, and no expert's delta.

The module is known by what transformers' interface for experts has such modules declare (``has_gate``,
``is_transposed``, ``has_bias``, ``has_post_expert_norm`` and ``_apply_gate``), which settles what they compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Additive, Base
from veneer.ops.experts import Stack, routed
from veneer.ops.lowrank import LowRank

if TYPE_CHECKING:
    from veneer.engine.adapted import Adapted

PAIR = ("gate_up_proj", "down_proj")
ROUTING = (("top_k_index", "router_indices"), ("top_k_weights", "routing_weights"))
"""What the experts are called with besides their input, under either name."""


def way(chain: list[Adapted], names: list[str], args: tuple, kwargs: dict[str, Any]) -> Base | None:
    """The short way for the wrappers of one module of experts; None where only the weights themselves can be changed.

    Args:
        chain: the wrappers, outermost first.
        names: the adapters of the outermost one that are to run.
        args, kwargs: what the module is called with besides its input.
    """
    module, routing = chain[-1].base_layer, _routing(args, kwargs)
    if routing is None or torch.compiler.is_compiling() or not _plain(module) or _active(chain[0]) != names:
        return None
    branches: dict[str, tuple[LowRank, float]] = {}
    for host in chain:
        found = _branch(host)
        if host.site.parameter not in PAIR or found is None:
            return None
        branches.update((host.site.parameter, one) for one in found)
    first, second = (_stack(module, name, branches.get(name)) for name in PAIR)
    if torch.is_autocast_enabled(first.weight.device.type):
        return None
    return lambda x: routed(x, *routing, first, second, module._apply_gate)


def _routing(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    given, left = list(args), dict(kwargs)
    for names in ROUTING[len(given) :]:
        given += [left.pop(name) for name in names if name in left]
    if left or len(given) != 2 or not all(isinstance(t, Tensor) and t.dim() == 2 for t in given):
        return None
    return given[0], given[1]


def _plain(module: nn.Module) -> bool:
    if not (getattr(module, "has_gate", False) and hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")):
        return False
    if module.has_post_expert_norm or "forward" in module.__dict__:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    own = module._parameters
    wanted = (*PAIR, *(f"{name}_bias" for name in PAIR if module.has_bias))
    return all(type(own.get(name)) is nn.Parameter and not own[name].requires_grad for name in wanted)


def _active(host: Adapted) -> list[str]:
    return [n for n in host.state.active if n in host.adapters and n not in host.merged_names]


def _branch(host: Adapted) -> list[tuple[LowRank, float]] | None:
    """The active branch of a wrapper with its gain, in a list that is empty without one; None for anything else."""
    names = _active(host)
    if not names:
        return []
    adapter, gain = host.adapters[names[0]], host._gain(names[0])
    low = adapter.low_rank() if len(names) == 1 and isinstance(adapter, Additive) else None
    if low is None or low.a.dim() != 3 or low.bias is not None or low.dropout or isinstance(gain, Tensor):
        return None
    return [(low, 1.0 if gain is None else gain)]


def _stack(module: nn.Module, name: str, branch: tuple[LowRank, float] | None) -> Stack:
    weight = getattr(module, name)
    weight = weight.transpose(-1, -2) if module.is_transposed else weight
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    if branch is None:
        return Stack(weight, bias)
    low, gain = branch
    return Stack(weight, bias, low.a, low.b, low.scaling * gain)
