"""Layers whose weight is read by the code around them, which never calls them: Mamba's mixers and their like.

A fused kernel takes ``self.out_proj.weight``, so an adapter that stands around ``out_proj`` would train nothing and do
nothing. Which layers are read is found in the code of the class that holds them; where one is adapted, what is read
there is the weight with the adapters in it, gradients included.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.sites import Site
from veneer.engine.adapted import Adapted
from veneer.engine.places import Places
from veneer.hf.layer_face import PeftLayer

HARMLESS = frozenset({"device", "dtype", "shape", "size", "dim", "ndim", "is_cuda", "is_meta", "requires_grad"})
"""What may be asked of a weight that an adapter does not change."""


@functools.cache
def read_by(owner: type[nn.Module]) -> frozenset[str]:
    """The sub-modules (as dotted names) whose ``weight`` or ``bias`` the forward of ``owner`` reads itself.

    Followed are ``forward`` and the methods of the class that it names. A class without source reads nothing.
    """
    found: set[str] = set()
    for function in _reached(owner):
        if {"weight", "bias"} & set(function.__code__.co_names):
            found |= _reads(function)
    return frozenset(found)


def _reached(owner: type[nn.Module]) -> Iterator[Any]:
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        function = inspect.unwrap(getattr(owner, waiting.pop(), None) or _nothing)
        if not inspect.isfunction(function) or function.__module__.partition(".")[0] == "torch":
            continue
        yield function
        names = [n for n in function.__code__.co_names if n not in seen and inspect.isfunction(getattr(owner, n, None))]
        seen.update(names)
        waiting += names


def _nothing() -> None:
    return None


def _reads(function: Callable[..., Any]) -> set[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return set()
    around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    reads = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("weight", "bias"))
    paths = ((_path(node.value), around[node]) for node in reads)
    return {path for path, above in paths if path and not _is_harmless(above)}


def _path(node: ast.AST) -> str:
    """``a.b`` for the expression ``self.a.b``; else nothing."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ""


def _is_harmless(above: ast.AST) -> bool:
    """Whether what is done to a weight needs no values of it: its dtype, ``is None``, ``isinstance``."""
    if isinstance(above, ast.Attribute):
        return above.attr in HARMLESS
    return isinstance(above, ast.Compare) or (
        isinstance(above, ast.Call) and isinstance(above.func, ast.Name) and above.func.id in ("isinstance", "hasattr")
    )


def readers(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """path -> the class of a module around it that reads its weight, for those that are read."""
    places = Places(model)
    around: dict[str, list[tuple[int, type[nn.Module]]]] = {}
    found = {}
    for path in paths:
        place = path.rpartition(".")[0]
        if place not in around:
            around[place] = list(_reading(places, place))
        for depth, kind in around[place]:
            if ".".join(path.split(".")[-depth:]) in read_by(cast(Any, kind)):
                found[path] = kind.__name__
                break
    return found


def _reading(places: Places, place: str) -> Iterator[tuple[int, type[nn.Module]]]:
    """(how far out, class) of the last three modules on the way to a place that read any weight at all."""
    for depth in (1, 2, 3):
        kind = type(places[place])
        if read_by(cast(Any, kind)):
            yield depth, kind
        if not place:
            break
        place = place.rpartition(".")[0]


def refuse_unreadable(pairs: Iterable[tuple[Site, Adapter]], read: dict[str, str], training: bool) -> None:
    """Refuse, before anything is planted, adapters that have no weight to show at a layer whose weight is read.

    Args:
        pairs: what is to be planted.
        read: path -> class, as ``readers`` found them.
        training: dropouts are going to be on.

    Raises:
        ValueError: names the layer, who reads it, and what to do.
    """
    for site, adapter in pairs:
        reader = read.get(site.path)
        if reader is None or adapter.replacement() is not None or adapter.overrides() is not None:
            continue
        dropping = training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in adapter.modules())
        why = "a dropout of its input would not happen there" if dropping else _without_weight(site, adapter)
        if why:
            leaf = site.path.rpartition(".")[2]
            raise ValueError(
                f"{reader} reads the weight of '{site.path}' and does not always call that layer, so only what changes "
                f"the weight can act there: {why.rstrip('.')}. Leave the layer out (exclude_modules=['{leaf}'])"
                + (" or set the dropout to 0." if dropping else ".")
            )


def _without_weight(site: Site, adapter: Adapter) -> str:
    """Why there is no adapted weight here; nothing if there is one."""
    lead = next(adapter.parameters(), None)
    weight = torch.zeros(site.shape, device=site.device if lead is None else lead.device)
    try:
        with torch.no_grad():
            adapter.merged(weight, None)
    except ValueError as error:
        return str(error)
    return ""


class ReadLayer(PeftLayer):
    """An adapted layer that shows its adapted weight to who reads it, and runs as any other where it is called."""

    @property
    def weight(self) -> Any:
        return self._seen("weight")

    @property
    def bias(self) -> Any:
        return self._seen("bias")

    def _seen(self, what: str) -> Any:
        own = getattr(self.base_layer, what)  # with the adapters of an inner wrapper
        if self._decided != self.state.version:
            self._decide(self.state)
        if not self.state.enabled or not self._names:
            return own
        gains = [self._gain(name) for name in self._names]
        one_for_all = self.state.route is None or set(self.state.route) == set(self._names[:1])
        if not one_for_all or any(isinstance(gain, Tensor) and gain.numel() > 1 for gain in gains):
            raise ValueError(
                f"The weight of '{self.site.path}' is read as one for the whole batch, so neither its rows nor its "
                "tokens can have adapters of their own; run those of each adapter by themselves."
            )
        return self._with_adapters(what, own)

    def _with_adapters(self, what: str, own: Tensor | None) -> Tensor | None:
        inside: list[tuple[str, Adapter]] = []
        for name in self._names:
            adapter = self._own(name)
            if (copy := adapter.replacement()) is not None:
                own, inside = getattr(copy, what), []
            elif (new := adapter.overrides()) is not None:
                own = new.get(what, own)
            else:
                inside.append((name, adapter))
        if not inside or what == "bias" and own is None:
            return own
        within = isinstance(self.base_layer, Adapted)
        weight, bias = self._fold(inside, self.site._stored_form(self.base_layer.weight) if within else None)
        if what == "bias":
            return None if bias is None else bias.to(self.site.dtype)
        return self.site._stored_form(weight.to(self.site.dtype))
