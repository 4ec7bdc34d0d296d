"""Layers that run together in training: those that read the same input, and gated feed-forward blocks.

Query, key and value projections of self-attention are computed in one function when the first of them is called, and
the others find their output ready: one dropout mask, x kept once, its gradient added up in one buffer. A module whose
``forward`` is ``down(act(gate(x)) * up(x))``, which is read off by tracing its class, runs as one function that keeps
less (``ops.gated``). Both are only taken with gradients, and where each layer has at most one low-rank branch and
nothing else upon it; otherwise the layers run one by one. ``State.joins = False`` turns both off; ``report`` tells why
a block is not taken. No model's code is changed, and a removed adapter takes its block along.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.engine.lowrank_path import _HALF, PLAIN, LowRankPath
from veneer.ops.gated import gated
from veneer.ops.lowrank import Layer, fused_linears

if TYPE_CHECKING:
    from veneer.engine.adapted import Adapted
    from veneer.engine.state import State

SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
)
OTHER_INPUTS = {"key_value_states", "encoder_hidden_states", "kv_hidden_states", "key", "value", "query", "memory"}
"""Arguments of attention whose keys and values read something else than its queries."""


def layer_of(module: nn.Module, x: Tensor) -> Layer | str:
    """A frozen linear layer with its one low-rank branch, if any, or why it is not that."""
    low = None
    if getattr(module, "is_adapted", False):
        host: Any = module
        state: State = host.state
        if not state.enabled or state.route is not None or state.gains or host.gains:
            return "adapters are off, weighted or mixed"
        if host._forward_hooks or host._forward_pre_hooks:
            return "a layer is hooked"
        if host._decided != state.version:
            host._decide(state)
        module = host.base_layer
        if host._names:
            if not isinstance(host._path, LowRankPath) or len(host._path.adapters) != 1:
                return "a layer has several adapters, or one that is not low-rank"
            low = host._path.adapters[0].low_rank()
            if low is None or low.bias is not None or (low.a.dtype is not x.dtype and x.dtype not in _HALF):
                return "an adapter has a bias, or another dtype than its layer"
    if type(module) is not nn.Linear or type(module.weight) not in PLAIN or module.weight.dtype is not x.dtype:
        return "a layer is not a plain linear one of its input's dtype"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "a layer is hooked"
    if module.weight.requires_grad or (module.bias is not None and module.bias.requires_grad):
        return "a layer of the base trains"
    return Layer(module.weight, module.bias, low)


def _layers(modules: Iterable[nn.Module], x: Tensor) -> list[Layer] | str:
    found = []
    for module in modules:
        layer = layer_of(module, x)
        if isinstance(layer, str):
            return layer
        found.append(layer)
    return found


def _dropouts(layers: Iterable[Layer]) -> int:
    """How many different probabilities the branches have."""
    return len({layer.low.dropout for layer in layers if layer.low is not None})


def _runs_alone(x: Tensor) -> bool:
    return not torch.is_grad_enabled() or x.is_inference() or torch.is_autocast_enabled(x.device.type)


# ---- layers that read the same input --------------------------------------------------------------------------------
class Group:
    """Adapted layers that are called one after another with the very same tensor."""

    def __init__(self, hosts: list[Adapted]):
        self.hosts = hosts
        self.x: Tensor | None = None
        self.version = 0
        self.ready: dict[int, Tensor] = {}

    def serve(self, host: Adapted, x: Tensor) -> Tensor | None:
        """The host's output for x, together with the others', or ready from when one of them was called."""
        if self.x is x and self.version == x._version and id(host) in self.ready:
            y = self.ready.pop(id(host))
            self.x = x if self.ready else None
            return y
        self.x, self.ready = None, {}
        if not host.state.joins or _runs_alone(x):
            return None
        layers = _layers(self.hosts, x)
        if isinstance(layers, str) or _dropouts(layers) > 1:
            return None
        ys = fused_linears(x, layers)
        self.x, self.version = x, x._version
        self.ready = {id(other): y for other, y in zip(self.hosts, ys, strict=True)}
        return self.ready.pop(id(host))

    def path(self, *given: Any) -> LowRankPath:
        """The way for one of its layers; see ``lowrank_path.path``."""
        return GroupedPath(*given)

    def __deepcopy__(self, memo: dict) -> None:
        return None  # the copy's tuner arranges its own

    def __reduce__(self) -> Any:
        return type(None), ()


class GroupedPath(LowRankPath):
    """The short way of a layer in a group."""

    def __init__(self, host: Adapted, *rest: Any):
        super().__init__(host, *rest)
        self.host = host

    def trained(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        group = self.host.group
        y = None if group is None else group.serve(self.host, x)
        return super().trained(x, weight, bias) if y is None else y


# ---- gated blocks ---------------------------------------------------------------------------------------------------
class Pattern(NamedTuple):
    """The children of a gated block, by name, and its activation."""

    gate: str
    up: str
    down: str
    act: Callable[[nn.Module], Callable[[Tensor], Tensor]]


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The block's own ``forward``, in one function where that is possible."""
    if not torch.compiler.is_compiling() and not args and not kwargs:
        y = _joined(self, x)
        if y is not None:
            return y
    return type(self).forward(self, x, *args, **kwargs)


_forward.__name__ = "forward"  # under which a pickled method is looked up


def _joined(block: Any, x: Any) -> Tensor | None:
    if not torch.is_grad_enabled() or not isinstance(x, Tensor) or _runs_alone(x):
        return None
    pattern = _pattern(type(block), block)
    if pattern is None:
        _dismiss(block)
        return None
    children = [block._modules[name] for name in pattern[:3]]
    adapted = [child for child in children if getattr(child, "is_adapted", False)]
    if not adapted or not adapted[0].state.joins:
        return None
    layers = _layers(children, x)
    if isinstance(layers, str) or _dropouts(layers[:2]) > 1 or _dropouts(layers) == 0:
        return None
    act = pattern.act(block)
    if getattr(act, "inplace", False) or getattr(act, "_forward_hooks", None):
        return None
    gate, up, down = layers
    return gated(x, gate, up, down, act)


_PATTERNS: dict[type, Pattern | None] = {}


def _pattern(kind: type, block: nn.Module) -> Pattern | None:
    """What ``kind.forward`` is, by tracing it once; None where it is not a gated block."""
    if kind not in _PATTERNS:
        _PATTERNS[kind] = _traced(block)
    return _PATTERNS[kind]


def _traced(block: nn.Module) -> Pattern | None:
    from torch.fx import Tracer

    class Children(Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    try:
        nodes = list(Children().trace(block).nodes)
    except Exception:  # a forward that branches on values, or asks for more than tensors
        return None
    if len(nodes) != 7 or [nodes[0].op, nodes[-1].op] != ["placeholder", "output"]:
        return None
    down = nodes[-1].args[0]
    product = down.args[0] if getattr(down, "op", "") == "call_module" and len(down.args) == 1 else None
    if getattr(product, "target", None) not in (operator.mul, torch.mul) or len(product.args) != 2:
        return None
    for act, up in (product.args, product.args[::-1]):
        gate = act.args[0] if getattr(act, "args", ()) else None
        if all(_reads(node, nodes[0]) for node in (gate, up)) and (found := _activation(act)) is not None:
            return Pattern(str(gate.target), str(up.target), str(down.target), found)
    return None


def _reads(node: Any, x: Any) -> bool:
    return getattr(node, "op", "") == "call_module" and node.args == (x,) and not node.kwargs


def _activation(node: Any) -> Callable[[nn.Module], Callable[[Tensor], Tensor]] | None:
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return lambda block: getattr(block, node.target)
    if node.op == "call_function" and len(node.args) == 1 and not node.kwargs.get("inplace"):
        act = functools.partial(node.target, **node.kwargs)
        return lambda block: act
    return None


# ---- arranging ------------------------------------------------------------------------------------------------------
def arrange(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Join what can be joined among the children of each module, and take apart what cannot be any more.

    Returns:
        The modules that something was joined in.
    """
    found = []
    for module in modules:
        _dismiss(module)
        if _arranged(module):
            found.append(module)
    return found


def _arranged(module: nn.Module) -> bool:
    children = module._modules
    names = next((names for names in SHARING if all(_adapted(children.get(name)) for name in names)), None)
    if names is not None and _attends_to_itself(type(module)):
        hosts: list[Any] = [children[name] for name in names]
        group = Group(hosts)
        for host in hosts:
            host.__dict__.update(group=group, _decided=-1)
    adapted = sum(_adapted(child) for child in children.values())
    linear = adapted + sum(type(child) is nn.Linear for child in children.values())
    gates = adapted and linear == 3 and len(children) <= 4 and "forward" not in module.__dict__
    if gates:
        module.__dict__["forward"] = MethodType(_forward, module)
    return names is not None or bool(gates)


@functools.cache
def _attends_to_itself(kind: type) -> bool:
    return not OTHER_INPUTS & set(inspect.signature(kind.forward).parameters)  # type: ignore[attr-defined]


def _dismiss(module: nn.Module) -> None:
    own = getattr(module.__dict__.get("forward"), "__func__", None)
    if own is not None and own in (_forward, type(module).forward):  # a pickle brings the second in place of the first
        del module.__dict__["forward"]
    for child in module._modules.values():
        if child is not None and child.__dict__.get("group") is not None:
            child.__dict__.update(group=None, _decided=-1)


def _adapted(child: Any) -> bool:
    return getattr(type(child), "is_adapted", False) and child.site.kind == "linear"


def report(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    """path -> "joined", or why the layers run one by one; for every module that could be joined.

    Args:
        model: with adapters.
        x: something of the dtype and on the device that the layers see; default: of their weights'.
    """
    out = {}
    for path, module in model.named_modules():
        group = next((c.group for c in module._modules.values() if getattr(c, "group", None) is not None), None)
        blocked = getattr(module.__dict__.get("forward"), "__func__", None) is _forward
        pattern = _pattern(type(module), module) if blocked else None
        if group is None and pattern is None:
            continue
        children = group.hosts if pattern is None else [module._modules[name] for name in pattern[:3]]
        weight = next(c.base_layer.weight for c in children if _adapted(c))
        layers = _layers(children, x if x is not None else weight.new_empty(0))
        if isinstance(layers, str):
            out[path] = layers
        elif _dropouts(layers if pattern is None else layers[:2]) > 1:
            out[path] = "its layers drop with different probabilities"
        else:
            joins = all(c.state.joins for c in children if _adapted(c))
            out[path] = "joined" if joins else "switched off"
    return out
