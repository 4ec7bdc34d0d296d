"""What a merge puts in a layer's place, and takes out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import quant
from veneer.core.adapter import Adapter, Reweight, Weight
from veneer.core.sites import Parameters, Site
from veneer.engine.folding import fold
from veneer.engine.packed_merge import DEQUANTIZE, REQUANTIZE, Loss, Way
from veneer.engine.state import State


class Mergeable(nn.Module):
    """A layer whose adapters can be folded into its own parameters, and those be put back as they were."""

    site: Site
    state: State
    base_layer: Any
    adapters: Any
    gains: dict[str, float | Tensor]
    original: Parameters | tuple[nn.Module] | None = None
    """What a merge put aside."""
    lent: Parameters | None = None
    guest: Parameters | None = None
    merged_names: tuple[str, ...] = ()

    def fold_in(
        self,
        names: Iterable[str],
        check: bool = True,
        keep: torch.device | str | None = None,
        way: Way = DEQUANTIZE,
    ) -> Loss | None:
        """Fold the named adapters into new parameters and put those in; the old objects are kept for ``fold_out``.

        Args:
            names: adapters.
            check: refuse a result that is not finite.
            keep: device that holds the old objects meanwhile.
            way: what a packed layer becomes.

        Returns:
            For a packed layer: what storing the sum costs there.

        Raises:
            ValueError: an adapter cannot be merged here, or the result is not finite.
        """
        names = [n for n in names if n in self.adapters]
        if not names:
            return None
        before = self.merged_names
        self.fold_out()  # what was merged before is folded again together with the new ones
        names = [*before, *(n for n in names if n not in before)]
        overrides = {k: v for n in names for k, v in (self.adapters[n].overrides() or {}).items()}
        if overrides:
            self.original = self.site.put({k: nn.Parameter(v.detach().clone(), False) for k, v in overrides.items()})
            self.merged_names = tuple(names)
            self.state.renew()
            return None
        ordered = [
            (n, self.adapters[n]) for n in sorted(names, key=lambda n: not isinstance(self.adapters[n], Reweight))
        ]
        row = quant.backend(self.site.module)
        with torch.no_grad():
            weight, bias = self._fold(ordered)
            exact = weight
            if row is not None and not isinstance(way, str):
                weight, bias = self._fold(ordered, self._given(way, ordered))
        dtype = self.site.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if check and not (_finite(weight) and (bias is None or _finite(bias))):
            self.fold_in(before, check=False, keep=keep, way=way)
            raise ValueError(
                f"NaNs detected in the merged weights: with {', '.join(names)}, those of '{self.site.path}' are not "
                "finite; nothing was merged. The adapter seems to be broken."
            )
        loss = None
        if row is None:
            self.original = self.site.swap(weight, bias)
        else:
            loss = self._settle_packed(row, exact, weight, bias, way)
        self.merged_names = tuple(names)
        self.state.renew()
        if keep is not None:
            _moved(self.original, torch.device(keep))
        return loss

    def _given(self, way: Mapping[str, Tensor], own: list[tuple[str, Adapter]]) -> Tensor:
        """The original weight of this layer, as its site shows weights."""
        path, shape = self.site.path, self.site.shape
        moved = [name for name, adapter in own if adapter.residual is not None]
        if moved:
            raise ValueError(
                f"Adapter '{moved[0]}' replaced the base weight of '{path}' at its start, so its sum with the original "
                "weight means nothing; merge with quantized='dequantize'."
            )
        if path not in way:
            raise ValueError(f"The original weights hold none for '{path}'.")
        weight = self.site._stored_form(way[path])
        if tuple(weight.shape) != shape:
            raise ValueError(f"The original weight of '{path}' has shape {tuple(weight.shape)}, not {shape}.")
        return weight.to(self.site.device)

    def _settle_packed(self, row: quant.Backend, exact: Tensor, weight: Tensor, bias: Tensor | None, way: Way) -> Loss:
        """Put a sum into a packed layer's place, and measure what is left of it."""
        site, before = self.site, self.site.weight.to(exact)
        if way == REQUANTIZE:
            self.original = site.swap(weight, bias)
        elif row.plain:
            self.original = site.swap(weight, bias, dense=True)
        else:
            self.original = self.exchange((quant.dense_layer(site.module, weight, bias),))
        return Loss.between(site.weight.to(exact), exact, before)

    def exchange(self, original: Parameters | tuple[nn.Module]) -> Parameters | tuple[nn.Module]:
        """Put a layer's parameters, or a layer, in its place; returns what was there."""
        if isinstance(original, dict):
            return self.site.put(original)
        *_, innermost = hosts(self)
        old, innermost.base_layer = innermost.base_layer, original[0]
        self.sync()
        return (old,)

    def sync(self) -> None:
        """Have the site show the layer that runs now: a dense one may stand in for a packed one."""
        *_, innermost = hosts(self)
        self.site.module = innermost.base_layer

    def fold_out(self) -> None:
        """Put the very parameter objects back that were there before ``fold_in``."""
        if self.original is None:
            return
        self.sync()
        _moved(self.original, self.site.device)
        self.exchange(self.original)
        self.original, self.merged_names = None, ()
        self.state.renew()

    def lend(self, residual: Parameters | None) -> None:
        """Have ``residual`` stand in for the layer's own parameters, or, with None, have those back."""
        if self.guest is residual:
            return
        if self.lent is not None:
            self.site.put(self.lent)
        self.lent = None if residual is None else self.site.put(residual)
        self.guest = residual

    def _fold(self, inside: Iterable[tuple[str, Adapter]], weight: Tensor | None = None) -> Weight:
        """``merged`` of each adapter over (W, b), in the adapters' dtype (at least float32); W: the layer's own."""
        pairs = [(adapter, self._gain(name)) for name, adapter in inside]
        return fold(pairs, self.site.weight if weight is None else weight, self._inner_bias())

    def _inner_bias(self) -> Tensor | None:
        """The layer's bias, or the one that an active adapter of an inner wrapper puts in its place."""
        bias = self.site.bias
        for host in hosts(self.base_layer):
            for name in self.state.active:
                if name in host.adapters and name not in host.merged_names:
                    bias = (host.adapters[name].overrides() or {}).get("bias", bias)
        return bias

    def _gain(self, name: str) -> float | Tensor | None:
        gain, here = self.state.gains.get(name), self.gains.get(name)
        gain = gain.get(self.site.path) if isinstance(gain, dict) else gain
        if gain is None or here is None:
            return here if gain is None else gain
        return gain * here


def hosts(module: nn.Module) -> Iterator[Any]:
    """The wrappers of one layer, outermost first."""
    while isinstance(module, Mergeable):
        yield module
        module = module.base_layer


def _finite(t: Tensor) -> bool:
    """Whether all entries are: the least and the largest tell, in one pass and without a tensor of answers."""
    return t.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(t))


def _moved(original: Parameters | tuple[nn.Module] | None, device: torch.device) -> None:
    if isinstance(original, tuple):
        original[0].to(device)
    for parameter in (original or {}).values() if not isinstance(original, tuple) else ():
        if parameter is not None and parameter.device != device:
            parameter.data = parameter.data.to(device)
