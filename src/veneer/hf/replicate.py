"""Layer replication: a deeper model out of the same parameters (after SOLAR; Kim et al., 2023, arXiv:2312.15166).

    layer_replication=[[0, 4], [2, 5]] on five layers gives the layers 0, 1, 2, 3, 2, 3, 4

Every layer of the deeper model is a twin of an old one: its own module, the old one's parameters. So it costs no memory
but its adapters, and each twin can be adapted, and merged into, by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from veneer.engine.targets import original
from veneer.methods.lora_config import LoraConfig

INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""What families call the position that a layer or its attention holds for the cache of keys and values."""

LoraConfig.replicates = True


@dataclass
class Replication:
    """A replicated model's record.

    Attributes:
        ranges: the half-open ranges of old layer numbers.
    """

    ranges: tuple[tuple[int, int], ...]
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _layers: nn.ModuleList | None = None

    def undo(self) -> None:
        """The model as it was: the very modules, parameters and config objects."""
        while self._undo:
            self._undo.pop()()

    def unshare(self) -> None:
        """Give each layer parameters of its own, for a model that is to live without its adapters after a merge.

        A merge itself needs no such care: it puts a new parameter into its own layer and leaves the shared one alone.
        """
        seen: set[int] = set()
        for layer in self._layers or ():
            own = {id(p) for p in layer.parameters()}
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in seen:
                        twin = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                        module._parameters[name] = twin
            seen |= own
        self._undo.clear()


def replicate(model: nn.Module, ranges: Sequence[Sequence[int]]) -> Replication:
    """Make ``model`` deeper in place.

    Its config object is left alone: the model gets a copy, with the new depth and its lists of one entry a layer.

    Args:
        model: a transformers model, not adapted yet.
        ranges: ``[(start, end), ...]``, half-open, of old layer numbers.

    Raises:
        ValueError: a range that does not fit, or a model whose list of layers cannot be told.
    """
    config = getattr(model, "config", None)
    depth = getattr(_text(config), "num_hidden_layers", None) if config is not None else None
    if not isinstance(depth, int):
        raise ValueError(
            f"layer_replication needs a model whose config says num_hidden_layers; {type(model).__name__} does not."
        )
    order = _order(ranges, depth)
    parent, leaf, layers = _layer_list(model, depth)
    record = Replication(tuple((int(a), int(b)) for a, b in ranges))
    deeper = copy.deepcopy(config)
    _deepen(_text(deeper), order, depth)
    same = {id(config): deeper, id(_text(config)): _text(deeper)}
    twins = nn.ModuleList(_twin(layers[old], new, same) for new, old in enumerate(order))
    twins.train(layers.training)
    parent._modules[leaf] = twins
    record._undo.append(lambda: parent._modules.__setitem__(leaf, layers))
    record._layers = twins
    for module in _outside(model, twins):
        for name, value in list(vars(module).items()):
            if id(value) in same:
                module.__dict__[name] = same[id(value)]
                record._undo.append(lambda m=module, n=name, v=value: m.__dict__.__setitem__(n, v))  # type: ignore[misc]
    return record


def ranges_of(config: Any) -> tuple[tuple[int, int], ...] | None:
    """The replication an adapter's config asks for, in one form; None for none."""
    ranges = getattr(config, "layer_replication", None)
    return tuple((int(a), int(b)) for a, b in ranges) if ranges else None


def check_agrees(record: Replication | None, config: Any, name: str, others: Iterable[str]) -> None:
    """Refuse an adapter whose layers are not those of the adapters already there.

    Raises:
        ValueError: another replication than the model's, while other adapters are in it.
    """
    wanted, others = ranges_of(config), list(others)
    have = record.ranges if record is not None else None
    if others and wanted != have:
        raise ValueError(
            f"Adapter '{name}' has layer_replication={_said(wanted)}, but the model, which holds {', '.join(others)}, "
            f"has {_said(have)}; all adapters of one model need the same layers. Load it on a base model of its own."
        )


def _said(ranges: tuple[tuple[int, int], ...] | None) -> str:
    return str([list(r) for r in ranges]) if ranges else "None"


def _order(ranges: Sequence[Sequence[int]], depth: int) -> list[int]:
    order: list[int] = []
    for one in ranges:
        if len(one) != 2 or not all(isinstance(i, int) for i in one) or not 0 <= one[0] < one[1] <= depth:
            raise ValueError(
                f"layer_replication holds {list(one)}, which is no half-open range [start, end) of the {depth} layers "
                "of this model."
            )
        order += range(one[0], one[1])
    return order


def _text(config: Any) -> Any:
    """The config that counts the layers: the text part of a model of several modalities, else the config itself."""
    if "num_hidden_layers" in getattr(config, "__dict__", {}) or not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config()


def _layer_list(model: nn.Module, depth: int) -> tuple[nn.Module, str, nn.ModuleList]:
    """(parent, name, list) of the one outermost list with as many entries as the model has layers."""
    found: list[tuple[str, nn.Module, str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        for leaf, child in module._modules.items():
            whole = f"{path}.{leaf}" if path else leaf
            inside = any(whole.startswith(f"{p}.") for p, *_ in found)
            if isinstance(child, nn.ModuleList) and len(child) == depth and not inside:
                found.append((whole, module, leaf, child))
    if len(found) != 1:
        lists = ", ".join(path for path, *_ in found) or "none"
        raise ValueError(
            f"layer_replication needs one list of {depth} layers in {type(model).__name__}; found: {lists}. Models "
            "with an encoder and a decoder cannot be replicated."
        )
    if any(original(module) is not module for module in found[0][3].modules()):
        raise ValueError("layer_replication works on a model that is not adapted yet; unload its adapters first.")
    return found[0][1:]


def _deepen(config: Any, order: list[int], depth: int) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == depth and not name.startswith("_"):
            setattr(config, name, type(value)(value[i] for i in order))
    config.num_hidden_layers = len(order)


def _twin(layer: nn.Module, index: int, same: dict[int, Any]) -> nn.Module:
    """A layer's own module tree around the same parameters, buffers and (new) config, at another position."""
    tensors = [*layer.parameters(), *layer.buffers()]
    twin = copy.deepcopy(layer, {**{id(t): t for t in tensors}, **same})
    for module in twin.modules():
        for name in INDEX_NAMES:
            if isinstance(module.__dict__.get(name), int):
                module.__dict__[name] = index
    return twin


def _outside(model: nn.Module, layers: nn.ModuleList) -> Iterator[nn.Module]:
    """The modules of the model that are not in ``layers``."""
    inside = {id(m) for m in layers.modules()}
    return (m for m in model.modules() if id(m) not in inside)
