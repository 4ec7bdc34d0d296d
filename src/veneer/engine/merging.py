"""Adapters folded into the base's parameters, all layers or none, and the very same parameters put back."""

from __future__ import annotations

import warnings

import torch

from veneer.core.parts import is_cut
from veneer.engine.adapted import Adapted
from veneer.engine.holding import Holding
from veneer.engine.packed_merge import Loss, MergeReport, Way, chosen_way


class Merging(Holding):
    """What of a tuner merges."""

    def merge(
        self, *names: str, check: bool = True, keep: torch.device | str | None = None, quantized: Way | None = None
    ) -> MergeReport:
        """Fold adapters (default: the active ones) into new base parameters. All layers or none.

        Args:
            names: adapters, in the order in which they are folded.
            check: refuse results that are not finite.
            keep: device that holds the original parameters meanwhile; default: where they are.
            quantized: what becomes of packed layers: "dequantize" (the default) makes them dense, "requantize" packs
                the sum again, a mapping path -> weight (out, in) puts the sum with these original weights in.

        Returns:
            What was done at packed layers, with the measured error; also given as a warning where there are any.

        Raises:
            ValueError: an unknown name, an adapter whose effect is no weight, or a result that is not finite.
        """
        way = chosen_way(quantized)
        losses: dict[str, Loss] = {}
        chosen = names or self.state.active
        self._require(*chosen)
        prompts = [n for n in chosen if n in self.prompts]
        if prompts:
            raise ValueError(f"'{prompts[0]}' is a prompt, which has no weight to merge into.")
        weighing = [n for n in chosen if n in self.roots]
        if weighing:
            raise ValueError(f"'{weighing[0]}' weighs its adapters by the input, so they cannot be merged with it.")
        todo = [h for h in self._all_hosts(innermost_first=True) if any(n in h.adapters for n in chosen)]
        for host in todo:
            if any(is_cut(p) for p in host.site.module._parameters.values() if p is not None):
                raise ValueError(
                    f"The weight of '{host.site.path}' is sharded between processes, so nothing can be merged into it; "
                    "save the adapter, and merge it in one process."
                )
        for host in todo:
            for name in chosen:
                if name not in host.adapters:
                    continue
                adapter = host.adapters[name]
                if not adapter.mergeable and adapter.replacement() is None:
                    weight = torch.empty(0) if host.site.kind == "opaque" else host.site.weight
                    adapter.merged(weight, host.site.bias)  # says why it refuses
        done: list[tuple[Adapted, tuple[str, ...]]] = []
        try:
            for host in todo:
                mergeable = [n for n in chosen if n in host.adapters and host.adapters[n].replacement() is None]
                if mergeable:
                    before = host.merged_names
                    host.sync()
                    loss = host.fold_in(mergeable, check=check, keep=keep, way=way)
                    done.append((host, before))
                    losses |= {host.site.path: loss} if loss is not None else {}
        except BaseException:
            for host, before in reversed(done):
                host.fold_out()
                host.fold_in(before, check=False, keep=keep, way=way)
            self._sync()
            raise
        self._merged_hosts = [h for h in self._all_hosts(innermost_first=True) if h.merged_names]
        self._sync()
        report = MergeReport(tuple(chosen), way, losses)
        if losses:
            warnings.warn(str(report), stacklevel=2)
        return report

    def unmerge(self) -> None:
        """Put the very parameter objects back that were there before ``merge``."""
        if not self._merged_hosts:
            return
        for host in reversed(self._merged_hosts):
            host.fold_out()
        self._merged_hosts = []
        self._sync()

    def _sync(self) -> None:
        for host in self._all_hosts():
            host.sync()
