"""The short way through a linear layer whose active adapters are all low-rank: one call, decided in advance.

Without gradients it is as little as the arithmetic needs, for a decoded token has hardly more: three products. In a
mixed batch the stacked factors of all its adapters are kept from call to call. Where the same rows come again, they
are multiplied with all of these, and a mask keeps what is their own; or, where that would be more to read, each with a
copy of its own adapter's.
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
FEW = 2
"""So many rows for each adapter of a mixed batch may have copies of its factors."""
MANY = 8
"""Of more adapters than this, no row is multiplied with those of all; nor of any where there are fewer than two rows
for each (measured on a CPU with ranks of 8 to 64 and widths of 64 to 2048)."""


class Stack(NamedTuple):
    """The joined factors of a mixed batch's adapters, in the layer's dtype, and what they were made from."""

    seen: Seen
    down: Tensor
    """a's transpose, (in, total rank)."""
    up: Tensor
    """b's transpose, (total rank, out)."""
    parts: tuple[tuple[str, int, float], ...]
    """(adapter, rank, scaling) of each."""


class Joint(NamedTuple):
    """The factors of all adapters of a mixed batch, and for inputs of one size what is whose."""

    size: int
    down: Tensor
    """(in, total rank)."""
    mask: Tensor
    """(N, total rank), as ``State.mask`` has it."""
    up: Tensor
    """(total rank, out)."""


class Own(NamedTuple):
    """The factors of each row's adapter in a mixed batch; zero where a row has none, or a lower rank."""

    batch: int
    down: Tensor
    """(batch, in, rank)."""
    up: Tensor
    """(batch, rank, out), scaled."""


class Slots(NamedTuple):
    """Where adapters keep their factors, (table, name) each: read anew in each call, without asking them."""

    a: list[tuple[dict, str]]
    b: list[tuple[dict, str]]
    parts: tuple[tuple[str, int, float], ...]
    scaling: float | None
    """Where it is the same for all."""


class LowRankPath:
    """Runs one layer and the joined branches of its adapters; ``None`` from a call means: go the long way.

    A way serves until the switchboard's next change. What a call without gradients found out, the next ones use.

    Args:
        host: the wrapper.
        names: its active adapters, or in a mixed batch those that any row uses.
        route: the adapter of each row, in a mixed batch.
        before: the way that was taken until now, whose stack may still serve.
    """

    __slots__ = (
        "adapters", "alone", "device", "held", "layer", "mask", "names", "route", "scalings", "slots", "stack", "state",
    )  # fmt: skip

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
        self.held: Joint | Own | None = None
        if before is not None and self.stack is not None and before.held is not None and before.route == route:
            self.held = before.held  # as when texts are generated again with the same names
            self.state.rely(self.stack.seen)

    def __call__(self, x: Tensor) -> Tensor | None:
        layer = self.layer
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return None
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if weight is None or x.dtype is not weight.dtype or torch.is_autocast_enabled(self.device):
            return None
        if torch.is_grad_enabled():
            return None if weight.requires_grad else self.trained(x, weight, bias)
        held, slots = self.held, self.slots
        if held is not None:
            if type(held) is Own:
                if held.batch == x.shape[0]:
                    return _by_row(x, weight, bias, held.down, held.up)
            elif held.size == x.numel():
                return _masked(x, weight, bias, held)
        if self.alone is not None:
            if slots is not None and self.alone.__dict__.get("scaling") is self.scalings[0]:
                (at, a_name), (bt, b_name) = slots.a[0], slots.b[0]
                return _inferred(x, weight, bias, at[a_name], bt[b_name].t(), None, slots.scaling)
            low = _branch(self.alone, x)
            if low is None or low.dropout:
                return None if low is None else fused_linear(x, weight, bias, low)
            if low.gain is None and self.route is None and not self.alone.training:
                self.slots = _slots([self.alone], [low], self._parts([low]))
            return _inferred(x, weight, bias, low.a, low.b.t(), None, low.scaling, low.gain)
        if slots is not None:
            a, b = torch.cat([t[n] for t, n in slots.a]), torch.cat([t[n] for t, n in slots.b], 1)
            if slots.scaling is not None:
                return _inferred(x, weight, bias, a, b.t(), None, slots.scaling)
            return _inferred(x, weight, bias, a, b.t(), self._mask(x, slots.parts))
        return self._several(x, weight, bias)

    def trained(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """With gradients."""
        lows = self._lows(x)
        if lows is None or self.alone is not None:
            return None if lows is None else fused_linear(x, weight, bias, lows[0])
        low, parts = joined(lows), self._parts(lows)
        y = own_rows(self.state, x, weight, bias, low.a, low.b, parts)
        return fused_linear(x, weight, bias, low, self._mask(x, parts)) if y is None else y

    def _several(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Several adapters without gradients, while what the next calls need not find out again is found out."""
        stack = self.stack
        if stack is None or not stack.seen.unwritten():
            lows, self.mask, self.held = self._lows(x), None, None
            if lows is None:
                return None
            parts = self._parts(lows)
            down, up = torch.cat([low.a for low in lows]).t(), torch.cat([low.b for low in lows], 1).t()
            if self.route is None:
                self.slots = None if any(a.training for a in self.adapters) else _slots(self.adapters, lows, parts)
                return _inferred(x, weight, bias, down.t(), up, self._mask(x, parts))
            shared = [adapter.shared for adapter in self.adapters if adapter.shared is not None]
            down, up = down.to(x.dtype).contiguous(), up.to(x.dtype).contiguous()
            self.stack = stack = Stack(Seen(*self.adapters, *shared), down, up, parts)
        y = own_rows(self.state, x, weight, bias, stack.down.t(), stack.up.t(), stack.parts)
        if y is not None:
            return y
        mask = None if self.mask is None or self.mask[0] != x.shape else self.mask[1]
        if mask is not None:
            if self.held is None:
                self.state.rely(stack.seen)
            self.held = self._own(stack, x) or Joint(x.numel(), stack.down, mask, stack.up)
        return _inferred(x, weight, bias, stack.down.t(), stack.up, self._mask(x, stack.parts))

    def _own(self, stack: Stack, x: Tensor) -> Own | None:
        batch, many = len(x), len(stack.parts)
        if batch > FEW * many or (batch == FEW * many and many <= MANY):
            return None
        rank, start = max(rank for _, rank, _ in stack.parts), 0
        down, up = (x.new_zeros(batch, rank, n) for n in (len(stack.down), stack.up.shape[1]))
        for name, r, scaling in stack.parts:
            rows, part = self.state.rows(batch, x.device)[name], slice(start, start + r)
            down[rows, :r], up[rows, :r] = stack.down[:, part].t(), scaling * stack.up[part]
            start += r
        return Own(batch, down.mT, up)

    def _lows(self, x: Tensor) -> list[LowRank] | None:
        """The adapters' branches, if they can be joined."""
        lows = [_branch(adapter, x) for adapter in self.adapters]
        if self.alone is None and not all(low is not None and not low.dropout and low.gain is None for low in lows):
            return None  # what only one branch can have
        return None if None in lows else lows  # type: ignore[return-value]

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


def _branch(adapter: Additive, x: Tensor) -> LowRank | None:
    """The adapter's branch, where it fits an input like x."""
    low = adapter.low_rank()
    fits = low is not None and low.bias is None and (low.a.dtype is x.dtype or x.dtype in _HALF)
    return low if fits else None


def _slots(adapters: list[Additive], lows: list[LowRank], parts: tuple[tuple[str, int, float], ...]) -> Slots | None:
    """The adapters' slots; None where factors are computed."""
    where = {id(t): (m._parameters, n) for a in adapters for m in inside(a) for n, t in m._parameters.items()}
    a, b = [where.get(id(low.a)) for low in lows], [where.get(id(low.b)) for low in lows]
    scaling = lows[0].scaling if len({low.scaling for low in lows}) == 1 else None
    return None if None in a or None in b else Slots(a, b, parts, scaling)  # type: ignore[arg-type]


def _inferred(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    up: Tensor,
    mask: Tensor | None,
    scaling: float = 1.0,
    gain: Tensor | None = None,
) -> Tensor:
    """The eager form of ``fused_linear`` without dropout, for when nothing needs gradients.

    Args:
        x: (..., in).
        weight, bias, a, mask, scaling, gain: as there.
        up: b's transpose.
    """
    if a.dtype is not x.dtype:
        a, up = a.to(x.dtype), up.to(x.dtype)
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y, h = F.linear(flat, weight, bias), F.linear(flat, a)
    if mask is not None:
        h.mul_(mask)
    y.addmm_(h, up, alpha=scaling)
    if gain is not None:
        gain = gain.to(y.dtype)
        y.mul_(gain)
        if bias is not None:
            y.addcmul_(bias, 1 - gain)
    return y if len(shape) == 2 else y.view(*shape[:-1], -1)


def _by_row(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """The layer with a branch of its own for each row; down and up as in ``Own``."""
    y = F.linear(x, weight, bias)
    if x.dim() == 3:
        return y.baddbmm_(x.bmm(down), up)
    y.view(len(x), -1, y.shape[-1]).baddbmm_(x.reshape(len(x), -1, x.shape[-1]).bmm(down), up)
    return y


def _masked(x: Tensor, weight: Tensor, bias: Tensor | None, joint: Joint) -> Tensor:
    """The layer with all branches, of which each row keeps its own."""
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    y = F.linear(flat, weight, bias)
    y.addmm_(flat.mm(joint.down).mul_(joint.mask), joint.up)
    return y if len(shape) == 2 else y.view(*shape[:-1], -1)


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
