"""What a method computes from its own tensors alone, remembered while they stay the same."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from veneer.core.lean import inside

T = TypeVar("T")


class Seen:
    """Tensors as they were once: whether they still are those, with the same values.

    A value written past autograd's count of changes (``tensor.data.mul_(2)``) is not noticed.

    Args:
        modules: whose parameters and buffers, those of sub-modules included.
        tensors: others.
    """

    def __init__(self, *modules: nn.Module, tensors: tuple[Tensor, ...] = ()):
        inner = [m for module in modules for m in inside(module)]
        tables: list[dict] = [table for m in inner for table in (m._parameters, m._buffers)]
        tables.append(dict(enumerate(tensors)))
        found = [(table, name, t) for table in tables for name, t in table.items() if t is not None]
        self.tensors = [t for _, _, t in found]
        self.countable = not any(t.is_inference() for t in self.tensors)  # such tensors do not count their changes
        self.versions = [t._version for t in self.tensors] if self.countable else []
        self.pointers = [t.data_ptr() for t in self.tensors]
        found += [(m._modules, n, child) for m in inner for n, child in m._modules.items() if _has_parameters(child)]
        self.tables: list[dict] = [table for table, _, _ in found]
        self.names = [name for _, name, _ in found]
        self.held = [held for _, _, held in found]

    def still(self) -> bool:
        """Whether nothing has changed."""
        return (
            self.unwritten()
            and [t.data_ptr() for t in self.tensors] == self.pointers
            and all(map(is_, map(dict.get, self.tables, self.names), self.held))
        )

    def unwritten(self) -> bool:
        """Whether nothing was written into the tensors, where that no other has taken their place is known."""
        return self.countable and [t._version for t in self.tensors] == self.versions


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(p is not None for m in inside(module) for p in m._parameters.values())


def cached(owner: nn.Module, name: str, make: Callable[[], T], *others: Tensor | nn.Module | None) -> T:
    """``make()``, kept in eval mode without gradients for as long as the tensors it reads hold the same values.

    Args:
        owner: the module whose parameters and buffers ``make`` reads.
        name: what is computed; one value is kept for each name.
        make: computes it.
        others: the tensors and modules besides that ``make`` reads.

    Returns:
        The kept value, or a fresh one: always in training, with gradients, while compiling, and for tensors made in
        inference mode, which do not count their changes.
    """
    if owner.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return make()
    kept: dict[str, tuple[Seen, tuple, Any]] = owner.__dict__.setdefault("_kept", {})
    known = kept.get(name)
    if known is not None and known[0].still() and all(map(is_, known[1], others)):
        return known[2]
    modules = [module for module in others if isinstance(module, nn.Module)]
    seen = Seen(owner, *modules, tensors=tuple([t for t in others if isinstance(t, Tensor)]))
    kept[name] = (seen, others, make())
    return kept[name][2]
