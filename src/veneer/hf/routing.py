"""Who goes where: how much each expert of a mixture is used at each layer, and how decided the gates are."""

from __future__ import annotations

import contextlib
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


class Tally:
    """Gates summed by layer, over as many calls of a model as there are."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}  # path -> (sum of gates, sum of entropies, tokens)

    def add(self, path: str, gates: Tensor, mask: Tensor | None = None) -> None:
        """Count one layer's gates (..., experts), without the tokens whose ``mask`` (...,) is 0."""
        gates = gates.detach().float()
        if mask is not None and mask.shape == gates.shape[:-1]:
            gates = gates[mask.bool().to(gates.device)]
        gates = gates.flatten(0, -2)
        entropy = torch.special.entr(gates.clamp(min=0)).sum()
        load, before, tokens = self._sums.get(path, (torch.zeros_like(gates[0]), torch.zeros_like(entropy), 0))
        self._sums[path] = load + gates.sum(0), before + entropy, tokens + gates.shape[0]

    def clear(self) -> None:
        """Start anew."""
        self._sums.clear()

    def uses(self) -> list[LayerUse]:
        """One entry a layer, from the input up."""
        return [
            LayerUse(path, tuple((load / load.sum()).tolist()), float(entropy) / max(tokens, 1))
            for path, (load, entropy, tokens) in self._sums.items()
        ]


@contextlib.contextmanager
def watched(model: nn.Module, adapter_name: str = "default") -> Iterator[Tally]:
    """Within: every call of the model is counted, in training and in evaluation mode.

    Args:
        model: with a mixture (MoLA, MoLE, MixLoRA, LoRAMoE, Arrow, X-LoRA, Poly, Lily) active.
        adapter_name: the mixture.

    Yields:
        What has been counted so far; it stays empty for an adapter that routes nothing.
    """
    tuner = tuner_of(model)
    adapters, tally = list(tuner.adapters(adapter_name)), Tally()
    modes: list[bool] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        modes[:] = [a.training for _, a in adapters]
        for _, adapter in adapters:
            adapter.training = True  # it alone, no dropout in it: has it keep its gates

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        restore()
        for path, gates in _gates(adapters, tuner.roots.get(adapter_name)):
            tally.add(path, gates, kwargs.get("attention_mask"))

    def restore() -> None:
        for (_, adapter), mode in zip(adapters, modes, strict=False):
            adapter.training = mode
        modes.clear()

    handles = [
        tuner.model.register_forward_pre_hook(before, with_kwargs=True),
        tuner.model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield tally
    finally:
        restore()
        for handle in handles:
            handle.remove()


@torch.no_grad()
def routing(model: nn.Module, inputs: Mapping[str, Any], adapter_name: str = "default") -> list[LayerUse]:
    """Run a batch through a mixture and say how it was routed, padding left out.

    Args:
        model: with a mixture (MoLA, MoLE, MixLoRA, LoRAMoE, Arrow, X-LoRA, Poly, Lily) active.
        inputs: what the model is called with.
        adapter_name: the mixture.

    Returns:
        One entry a layer, from the input up.

    Raises:
        ValueError: the adapter routes nothing.
    """
    with watched(model, adapter_name) as tally:
        model(**inputs)
    found = tally.uses()
    if not found:
        raise ValueError(
            f"'{adapter_name}' is {tuner_of(model).configs[adapter_name].peft_type}, which routes nothing."
        )
    return found


def routes(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether the adapter is a mixture whose gates can be counted."""
    tuner = tuner_of(model)
    return adapter_name in tuner.roots or any(hasattr(a, "routed") for _, a in tuner.adapters(adapter_name))


def expert_names(model: nn.Module, adapter_name: str = "default") -> list[str]:
    """The experts as the mixture's settings call them; empty where they have no names but their numbers."""
    config: Any = tuner_of(model).configs[adapter_name]
    arrow = getattr(config, "arrow_config", None)
    if arrow is not None:
        return list(arrow.task_adapter_names or ())
    named = getattr(config, "experts", None) or getattr(config, "adapters", None)
    return list(named) if isinstance(named, list | dict) and all(isinstance(n, str) for n in named) else []


def _gates(adapters: Sequence[tuple[str, Adapter]], root: Any) -> Iterator[tuple[str, Tensor]]:
    for path, adapter in adapters:
        gates = getattr(adapter, "routed", None)
        if gates is not None:
            yield path, gates
    if root is not None and (sigma := root.get_latest_scalings()) is not None:
        yield from zip(root.layers, root.chosen(sigma).unbind(2), strict=True)


SHADES = " .:-=+*#%@"


def heat_map(uses: Sequence[LayerUse]) -> str:
    """A table of shades, a row per layer and a column per expert: '@' where an expert takes all, ' ' where nothing."""
    width = max(len(use.path) for use in uses)
    lines = []
    for use in uses:
        cells = "".join(SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)] * 2 for share in use.load)
        lines.append(f"{use.path:<{width}} |{cells}| {use.entropy:.2f}")
    return "\n".join(lines)
