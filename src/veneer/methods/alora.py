"""aLoRA: Activated LoRA (Greenewald et al., 2025, arXiv:2504.12397).

    y_j = W x_j + [j >= t] s B A drop(x_j)        t the start of the last occurrence of the invocation tokens

Tokens before the invocation run through W alone, so their keys and values are the base model's and can be shared with
it and with other aLoRAs. A row without an invocation stays the base model's; once invoked, a row stays so while its
cache grows. The effect depends on the input, so there is no merge. Cost: as LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Base, Weight
from veneer.core.sites import Site
from veneer.methods.lora import Lora, LoraConfig


class Invocations(nn.Module):
    """Where in the current call's tokens the adapter acts; worked out once a call for all layers."""

    def __init__(self, tokens: Sequence[int]):
        super().__init__()
        self.tokens = tuple(tokens)
        self._invoked: Tensor | None = None

    def mask(self, inputs: dict[Any, Any]) -> Tensor:
        """(batch, length) of the call's tokens: True from the invocation on.

        Args:
            inputs: what the call was given; keeps the answer until the next call clears it.

        Raises:
            ValueError: the call has no ``input_ids``.
        """
        key = "invoked from", self.tokens
        if key not in inputs:
            ids = inputs.get("input_ids")
            if ids is None:
                raise ValueError("aLoRA looks for its invocation tokens in input_ids, which this call was not given.")
            inputs[key] = self._find(ids, _cached(inputs.get("past_key_values")))
        return inputs[key]

    def _find(self, ids: Tensor, going_on: bool) -> Tensor:
        tokens = torch.tensor(self.tokens, device=ids.device)
        starts = ids.new_zeros(ids.shape, dtype=torch.bool)
        if ids.shape[1] >= len(tokens):
            starts[:, : ids.shape[1] - len(tokens) + 1] = (ids.unfold(1, len(tokens), 1) == tokens).all(-1)
        places = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(starts, places, -1).amax(1, keepdim=True)
        mask = (last >= 0) & (places >= last)
        before = self._invoked
        if going_on and before is not None:
            if len(before) != len(ids) and len(ids) % len(before) == 0:
                before = before.repeat_interleave(len(ids) // len(before))
            if len(before) == len(ids):
                mask = mask | (before.to(mask.device).unsqueeze(1) & (last < 0))
        self._invoked = mask[:, -1]
        return mask


def _cached(cache: Any) -> bool:
    if cache is None:
        return False
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else len(cache)
    return bool(length)


@Lora.variant("alora_invocation_tokens")
class Alora(Lora):
    """LoRA from the invocation on."""

    wants = frozenset({"input_ids", "past_key_values"})

    @classmethod
    def on(cls, site: Site, config: LoraConfig, shared: nn.Module | None = None) -> Alora:
        if site.kind not in ("linear", "conv1d_hf"):
            raise ValueError(
                f"aLoRA acts token by token on linear layers, which '{site.path}' ({site.kind}) is not; exclude it."
            )
        return cls.build(site, config, shared)

    @classmethod
    def plan(cls, config: LoraConfig, sites: Sequence[Site]) -> nn.Module:
        return Invocations(config.alora_invocation_tokens or ())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        mask = self.shared.mask(self.site.inputs)  # type: ignore[union-attr]
        if x.dim() == 3:
            mask = mask[:, -x.shape[1] :]  # a head may be asked for the last positions only
        mask = mask.reshape(*x.shape[:-1], 1).to(x.device)
        return y + (self.delta(x.to(self.dtype)) * mask).to(y.dtype)

    @property
    def mergeable(self) -> bool:
        return False

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        raise ValueError(f"aLoRA at '{self.site.path}' depends on the tokens and cannot be merged.")
