"""Who goes where: how much each expert of a mixture is used at each layer, and how decided the gates are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.hf.state_dict import tuner_of


@dataclass(frozen=True)
class LayerUse:
    """One layer's routing over some text.

    Attributes:
        path: the layer.
        load: each expert's share of the gates, summing to 1.
        entropy: mean entropy of a token's gates in nats; 0 where each token has one expert, log n where all are even.
    """

    path: str
    load: tuple[float, ...]
    entropy: float


@torch.no_grad()
def routing(model: nn.Module, inputs: Mapping[str, Any], adapter_name: str = "default") -> list[LayerUse]:
    """Run a batch through a mixture and say how it was routed, padding left out.

    Args:
        model: with a mixture (MoLA, MoLE, MixLoRA, LoRAMoE, Arrow, X-LoRA) active.
        inputs: what the model is called with.
        adapter_name: the mixture.

    Returns:
        One entry a layer, from the input up.

    Raises:
        ValueError: the adapter routes nothing.
    """
    tuner = tuner_of(model)
    adapters = list(tuner.adapters(adapter_name))
    modes = [a.training for _, a in adapters]
    for _, adapter in adapters:
        adapter.training = True  # it alone, no dropout in it: has it keep its gates
    try:
        model(**inputs)
        found = list(_gates(adapters, tuner.roots.get(adapter_name)))
    finally:
        for (_, adapter), mode in zip(adapters, modes, strict=True):
            adapter.training = mode
    if not found:
        raise ValueError(f"'{adapter_name}' is {tuner.configs[adapter_name].peft_type}, which routes nothing.")
    return [_use(path, gates.float(), inputs.get("attention_mask")) for path, gates in found]


def _gates(adapters: Sequence[tuple[str, Adapter]], root: Any) -> Iterator[tuple[str, Tensor]]:
    for path, adapter in adapters:
        gates = getattr(adapter, "routed", None)
        if gates is not None:
            yield path, gates
    if root is not None:
        sigma = root.get_latest_scalings()
        yield from zip(root.layers, root.chosen(sigma).unbind(2), strict=True)


def _use(path: str, gates: Tensor, mask: Tensor | None) -> LayerUse:
    if mask is not None and mask.shape == gates.shape[:-1]:
        gates = gates[mask.bool()]
    gates = gates.flatten(0, -2)
    load = gates.sum(0) / gates.sum()
    entropy = torch.special.entr(gates.clamp(min=0)).sum(-1).mean()
    return LayerUse(path, tuple(load.tolist()), float(entropy))


SHADES = " .:-=+*#%@"


def heat_map(uses: Sequence[LayerUse]) -> str:
    """A table of shades, a row per layer and a column per expert: '@' where an expert takes all, ' ' where nothing."""
    width = max(len(use.path) for use in uses)
    lines = []
    for use in uses:
        cells = "".join(SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)] * 2 for share in use.load)
        lines.append(f"{use.path:<{width}} |{cells}| {use.entropy:.2f}")
    return "\n".join(lines)
