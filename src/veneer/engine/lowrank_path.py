"""The short way through a linear layer whose active adapters are all low-rank: one call, decided in advance.

Without gradients it is as little as the arithmetic needs, for a decoded token has hardly more: three products, and in a
mixed batch the stacked factors of all its adapters are kept from call to call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from veneer.core.adapter import Additive
from veneer.core.cache import Seen
from veneer.core.lean import inside
from veneer.engine.gather_path import own_rows
from veneer.ops.lowrank import LowRank, fused_linear, joined

if TYPE_CHECKING:
    from veneer.engine.adapted import Adapted

_HALF = (torch.float16, torch.bfloat16)


class Stack(NamedTuple):
    """The joined factors of a mixed batch's adapters, in the layer's dtype, and what they were made from."""

    seen: Seen
    down: Tensor
    """a's transpose, (in, total rank)."""
    up: Tensor
    """b's transpose, (total rank, out)."""
    parts: tuple[tuple[str, int, float], ...]
    """(adapter, rank, scaling) of each."""


class Slots(NamedTuple):
    """Where adapters keep their factors, (table, name) each: read anew in each call, without asking the adapters."""

    a: list[tuple[dict, str]]
    b: list[tuple[dict, str]]
    parts: tuple[tuple[str, int, float], ...]


class LowRankPath:
    """Runs one layer and the joined branches of its adapters; ``None`` from a call means: go the long way.

    A way serves until the switchboard's next change. What a call without gradients found out, the next ones use.

    Args:
        host: the wrapper.
        names: its active adapters, or in a mixed batch those that any row uses.
        route: the adapter of each row, in a mixed batch.
        before: the way that was taken until now, whose stack may still serve.
    """

    def __init__(
        self, host: Adapted, names: list[str], route: tuple[str, ...] | None, before: LowRankPath | None = None
    ):
        self.layer: nn.Linear = host.base_layer
        self.state, self.names, self.route = host.state, names, route
        self.adapters: list[Additive] = [host.adapters[name] for name in names]
        self.alone = self.adapters[0] if route is None and len(names) == 1 else None
        self.device = self.layer.weight.device.type
        self.mask: tuple[torch.Size, Tensor] | None = None
        self.scalings = [getattr(adapter, "scaling", None) for adapter in self.adapters]
        same = before is not None and before.adapters == self.adapters and before.scalings == self.scalings
        kept = before.stack if before is not None and same else None
        self.stack: Stack | None = kept if kept is not None and kept.seen.still() else None
        self.slots: Slots | None = None

    def __call__(self, x: Tensor) -> Tensor | None:
        layer = self.layer
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return None
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if weight is None or x.dtype is not weight.dtype or torch.is_autocast_enabled(self.device):
            return None
        if torch.is_grad_enabled():
            return None if weight.requires_grad else self.trained(x, weight, bias)
        slots, stack = self.slots, self.stack
        if slots is not None and self.alone is not None:
            (a, name), (b, other) = slots.a[0], slots.b[0]
            return _inferred(x, weight, bias, a[name].t(), b[other].t(), None, self.alone.scaling)
        if slots is not None:
            down, up = torch.cat([t[n] for t, n in slots.a]).t(), torch.cat([t[n] for t, n in slots.b], 1).t()
            return _inferred(x, weight, bias, down, up, self._mask(x, slots.parts))
        if stack is not None and stack.seen.unwritten():
            y = own_rows(self.state, x, weight, bias, stack.down.t(), stack.up.t(), stack.parts)
            return _inferred(x, weight, bias, stack.down, stack.up, self._mask(x, stack.parts)) if y is None else y
        return self._asked(x, weight, bias)

    def trained(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """With gradients."""
        lows = self._lows(x)
        if lows is None or self.alone is not None:
            return None if lows is None else fused_linear(x, weight, bias, lows[0])
        low, parts = joined(lows), self._parts(lows)
        y = own_rows(self.state, x, weight, bias, low.a, low.b, parts)
        return fused_linear(x, weight, bias, low, self._mask(x, parts)) if y is None else y

    def _asked(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Without gradients, by what the adapters say now."""
        lows, self.mask = self._lows(x), None
        if lows is None:
            return None
        low, parts = lows[0], self._parts(lows)
        if low.dropout:
            return fused_linear(x, weight, bias, low)
        if self.route is None and low.gain is None and not any(adapter.training for adapter in self.adapters):
            self.slots = _slots(self.adapters, lows, parts)
        if self.alone is not None:
            return _inferred(x, weight, bias, low.a.t(), low.b.t(), None, low.scaling, low.gain)
        down, up = torch.cat([low.a for low in lows]).t(), torch.cat([low.b for low in lows], 1).t()
        if self.route is not None:
            shared = [adapter.shared for adapter in self.adapters if adapter.shared is not None]
            self.stack = Stack(Seen(*self.adapters, *shared), down.to(x.dtype), up.to(x.dtype).contiguous(), parts)
        return _inferred(x, weight, bias, down, up, self._mask(x, parts))

    def _lows(self, x: Tensor) -> list[LowRank] | None:
        """The adapters' branches, if they can be joined."""
        lows: list[LowRank] = []
        for adapter in self.adapters:
            low = adapter.low_rank()
            if low is None or low.bias is not None or (low.a.dtype is not x.dtype and x.dtype not in _HALF):
                return None
            if (low.dropout or low.gain is not None) and self.alone is None:
                return None  # what only one branch can have
            lows.append(low)
        return lows

    def _parts(self, lows: list[LowRank]) -> tuple[tuple[str, int, float], ...]:
        return tuple([(name, low.a.shape[0], low.scaling) for name, low in zip(self.names, lows)])

    def _mask(self, x: Tensor, parts: tuple[tuple[str, int, float], ...]) -> Tensor:
        """Each row's scaling of each part of the stacked rank, 0 where it is another row's: (N or 1, total rank)."""
        shape = x.shape
        if self.mask is None or self.mask[0] != shape:
            batch = 1 if self.route is None else shape[0]
            inner = 1 if self.route is None else x.numel() // (batch * shape[-1])
            self.mask = shape, self.state.mask(batch, parts, x.device, x.dtype, inner)
        return self.mask[1]


def _slots(adapters: list[Additive], lows: list[LowRank], parts: tuple[tuple[str, int, float], ...]) -> Slots | None:
    """The adapters' slots; None where factors are computed."""
    where = {id(t): (m._parameters, n) for a in adapters for m in inside(a) for n, t in m._parameters.items()}
    a, b = [where.get(id(low.a)) for low in lows], [where.get(id(low.b)) for low in lows]
    return None if None in a or None in b else Slots(a, b, parts)  # type: ignore[arg-type]


def _inferred(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scaling: float = 1.0,
    gain: Tensor | None = None,
) -> Tensor:
    """The eager form of ``fused_linear`` without dropout, for when nothing needs gradients.

    Args:
        x: (..., in).
        weight, bias, mask, scaling, gain: as there.
        down: a's transpose.
        up: b's transpose.
    """
    if down.dtype is not x.dtype:
        down, up = down.to(x.dtype), up.to(x.dtype)
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y, h = F.linear(flat, weight, bias), flat.mm(down)
    if mask is not None:
        h.mul_(mask)
    y.addmm_(h, up, alpha=scaling)
    if gain is not None:
        gain = gain.to(y.dtype)
        y.mul_(gain)
        if bias is not None:
            y.addcmul_(bias, 1 - gain)
    return y if len(shape) == 2 else y.view(shape[:-1] + (-1,))


PLAIN = (nn.Parameter, FakeTensor)
"""Types of weights that are not packed; a step that is only counted runs on the second."""


def path(
    host: Adapted, names: list[str], route: tuple[str, ...] | None, before: LowRankPath | None = None
) -> LowRankPath | None:
    """The short way for these adapters at this layer, or None where there is none."""
    layer = host.base_layer
    if type(layer) is not nn.Linear or type(layer.weight) not in PLAIN:
        return None
    if host.site.kind != "linear" or getattr(host.site, "turned", False) or not layer.weight.is_floating_point():
        return None
    adapters = [host.adapters[name] for name in names]
    with torch.no_grad():  # only asked here; saving tensors now would have a checkpoint count them
        if not all(isinstance(a, Additive) and a.low_rank() is not None for a in adapters):
            return None
    return (LowRankPath if host.group is None else host.group.path)(host, names, route, before)
