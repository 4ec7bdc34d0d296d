"""The one switchboard that all wrappers of a model share: which adapters are on, how strongly, and for which rows.

What a wrapper run eagerly reads are names and numbers. A compiled graph would be bound to them, and compiled anew at
each switch; so the same facts stand here as tensors too, which are replaced whenever something is switched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.core.cache import Seen

BASE = "__base__"
"""In a mixed batch: the name of rows that no adapter touches."""

_HEARD = ("active", "enabled", "gains", "route")


@dataclass
class State:
    """Which adapters are on, how strongly, and for which rows. One object per model."""

    joins = True
    """Layers that read the same input, and gated blocks, may run together in training (``blocks``)."""
    active: tuple[str, ...] = ()
    enabled: bool = True
    gains: dict[str, Any] = field(default_factory=dict)
    """How much of an adapter: a number, a tensor that broadcasts to a layer's output, or a dict path -> tensor."""
    route: tuple[str, ...] | None = None
    version: int = 0
    """Counts the changes after which a wrapper must decide anew how to run."""
    order: tuple[str, ...] = ()
    """All adapters, as a compiled graph lays them around a layer: where it matters, in the order of ``active``."""
    ordered: frozenset[str] = frozenset()
    compiled: bool = False
    felt: dict[str, Any] = field(default_factory=dict)
    """The gains that are no numbers."""
    strengths: dict[str, Tensor] = field(default_factory=dict)
    """device -> (wrappers, adapters in ``order``): how much of each adapter there is at each wrapper where it is on."""
    on: dict[str, Tensor] = field(default_factory=dict)
    """device -> (adapters in ``order``,): 1 where one is on now, or may be for some rows; else 0."""
    owners: dict[str, Tensor] = field(default_factory=dict)
    """device -> (rows of ``route``, adapters in ``order``): 1 where a row is the adapter's own; else it is empty."""
    _wrappers: int = 0
    _local: dict[tuple[int, str], float] = field(default_factory=dict)
    _rows: dict[tuple[int, torch.device], dict[str, Tensor]] = field(default_factory=dict)
    masks: dict[Any, Tensor] = field(default_factory=dict)
    """What ``mask`` found, since the last change."""
    settled: int = 0
    """Counts how often a wrapper took note of adapters that came or went, or got other tensors."""
    _relied: list[tuple[Tensor, int]] = field(default_factory=list)
    """Tensors, and their counts of changes when wrappers began to rely on them."""
    _watched: tuple[list[Tensor], list[int]] = ([], [])
    """The same in the order they were made in, aliases in place of the tensors: nearer together in memory."""

    def __post_init__(self) -> None:
        self.strengths = self.strengths or {"cpu": torch.zeros(0, 0)}
        self.on = self.on or dict.fromkeys(self.strengths, torch.zeros(0))
        self._sent = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HEARD or "_sent" not in self.__dict__:
            object.__setattr__(self, name, value)
        elif name == "gains" or self.__dict__[name] != value:
            object.__setattr__(self, name, value)
            self.changed()

    def changed(self) -> None:
        """Have every wrapper decide anew, and every compiled graph see what holds now."""
        self.renew()
        if self.compiled:
            self._tell()

    def renew(self) -> None:
        """Have every wrapper decide anew."""
        self.version += 1
        self.masks = {}
        self._relied, self._watched = [], ([], [])

    def rely(self, seen: Seen) -> None:
        """A wrapper goes by what it made of these tensors, without looking at them again: until the next change."""
        self._relied += zip(seen.tensors, seen.versions, strict=True)

    def look(self) -> None:
        """See whether something was written into the tensors that wrappers rely on; that is a change."""
        if len(self._watched[0]) != len(self._relied):
            pairs = sorted(self._relied, key=lambda pair: id(pair[0]))
            self._watched = [t.detach() for t, _ in pairs], [version for _, version in pairs]
        aliases, versions = self._watched
        if [t._version for t in aliases] != versions:
            self.renew()

    # ---- what compiled graphs read ----------------------------------------------------------------------------------
    def trace(self) -> None:
        """From now on there is a compiled graph that reads."""
        if not self.compiled:
            self.compiled = True
            self._tell()

    def enter(self, device: torch.device) -> int:
        """The number of a new wrapper: its row in ``strengths``."""
        self.reach(device)
        self._wrappers += 1
        return self._wrappers - 1

    def reach(self, device: torch.device) -> None:
        """Have what compiled graphs read at hand where a wrapper computes."""
        if str(device) not in self.strengths and device.type != "meta":
            for tables in (self.strengths, self.on):
                tables[str(device)] = tables["cpu"].to(device)
        self.renew()

    def name(self, *names: str, ordered: Iterable[str] = ()) -> None:
        """All adapters there are now; ``ordered`` are those that do not just add to the layer's output."""
        self.order, self.ordered = names, frozenset(ordered)
        self.changed()

    def at(self, wrapper: int, name: str, gain: float) -> None:
        """How much of an adapter there is at one wrapper, times what holds everywhere."""
        if gain == self._local.get((wrapper, name), 1.0):
            return
        self._local[wrapper, name] = gain
        self.renew()
        if self.compiled and name in self.order:
            place, value = (wrapper, self.order.index(name)), gain * self._number(name)
            for device, before in self.strengths.items():
                self.strengths[device] = before.clone()
                self.strengths[device][place] = value

    def _tell(self) -> None:
        """Lay the facts down as new tensors: the old ones may be kept for a backward pass."""
        active = [name for name in self.active if name in self.order]
        order = list(self.order)
        if self.ordered.intersection(active):
            for place, name in zip(sorted(map(order.index, active)), active, strict=True):
                order[place] = name
            self.order = tuple(order)
        self.felt = {name: gain for name, gain in self.gains.items() if not isinstance(gain, float | int)}
        with torch.inference_mode(False):
            strength = torch.tensor([self._number(name) for name in order]).repeat(self._wrappers, 1)
            local = [(w, order.index(name), gain) for (w, name), gain in self._local.items() if name in order]
            if local:
                wrappers, columns, gains = zip(*local, strict=True)
                strength[wrappers, columns] *= torch.tensor(gains)
            on = torch.tensor([float(self._is_on(name)) for name in order])
            self.strengths = {device: strength.to(device) for device in self.strengths}
            self.on = {device: on.to(device) for device in self.strengths}
            self.owners = {}
            if self.route is not None:
                own = torch.tensor([[float(owner == name) for name in order] for owner in self.route])
                self.owners = {device: own.to(device) for device in self.strengths}

    def _is_on(self, name: str) -> bool:
        return self.enabled and (self.route is not None or name in self.active)

    def _number(self, name: str) -> float:
        gain = self.gains.get(name, 1.0)
        return float(gain) if isinstance(gain, float | int) else 1.0

    # ---- rows -------------------------------------------------------------------------------------------------------
    def rows(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        """adapter -> its row numbers (int64) for a batch of this size; names repeat in place for beams.

        Raises:
            ValueError: the batch is no multiple of the number of names.
        """
        key = (batch, device)
        if key not in self._rows:
            assert self.route is not None
            times = self.times(batch, len(self.route))
            owner = [name for name in self.route for _ in range(times)]
            self._rows[key] = {
                name: torch.tensor([i for i, o in enumerate(owner) if o == name], device=device)
                for name in dict.fromkeys(owner)
            }
        return self._rows[key]

    @staticmethod
    def times(batch: int, names: int) -> int:
        """How many rows of a batch in turn belong to one name: beams of a row follow the row.

        Raises:
            ValueError: the batch is no multiple of the number of names.
        """
        times, rest = divmod(batch, names)
        if rest or not times:
            raise ValueError(
                f"adapter_names has {names} entries, but a layer was called with a batch of {batch}; "
                "give one name for each row of the batch."
            )
        return times

    def mask(
        self,
        batch: int,
        parts: tuple[tuple[str, int, float], ...],
        device: torch.device,
        dtype: torch.dtype,
        inner: int = 1,
    ) -> Tensor:
        """(batch * inner, total rank): a part's scaling where it is the row's own (in a mixed batch), else 0.

        Args:
            batch: number of rows; 1 without a route, where every part is every row's.
            parts: (adapter, rank, scaling) of each stacked branch.
            device: where the mask is needed.
            dtype: in which dtype.
            inner: what of a row lies in turn, all of it the same adapter's: tokens.
        """
        key = (batch, inner, parts, device, dtype)
        found = self.masks.get(key)
        if found is None:
            owners: list[str | None] = [None] * batch
            if self.route is not None:
                times = self.times(batch, len(self.route))
                owners = [name for name in self.route for _ in range(times)]
            rows = [[s * (owner in (None, name)) for name, r, s in parts for _ in range(r)] for owner in owners]
            found = torch.tensor(rows, device=device, dtype=dtype).repeat_interleave(inner, 0)
            self.masks[key] = found
        return found

    def send(self, names: Iterable[str] | None) -> None:
        """Route the rows of the batches to come, or stop routing."""
        names = None if names is None else tuple(names)
        if names != self.route:
            self._rows = {}
            self.route = names

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Within an eager run: no routing, and just this adapter active."""
        before = self.route, self.active
        self._quietly(None, (name,))
        try:
            yield
        finally:
            self._quietly(*before)

    def _quietly(self, route: tuple[str, ...] | None, active: tuple[str, ...]) -> None:
        object.__setattr__(self, "route", route)
        object.__setattr__(self, "active", active)
        self.renew()

    def __deepcopy__(self, memo: dict) -> State:
        twin = State(self.active, self.enabled, dict(self.gains), self.route, self.version, self.order, self.ordered)
        twin._wrappers, twin._local = self._wrappers, dict(self._local)
        twin.strengths = dict.fromkeys(self.strengths, torch.zeros(0, 0))
        twin.on = dict.fromkeys(self.on, torch.zeros(0))
        memo[id(self)] = twin
        return twin
