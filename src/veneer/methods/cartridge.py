"""Cartridges (Eyuboglu et al., 2025, arXiv:2506.06266).

    K_l' = [PK_l ; K_l]    V_l' = [PV_l ; V_l]        as prefix tuning, but started from a real text's own cache

The keys and values of a long text's first tokens are trained directly (on questions about the text that the model
itself made up, with the model that read the whole text as the teacher). The first ``num_frozen_tokens`` stay: they
hold up attention. Without training it is that text's own cache. ``veneer.initialize_kv_prefix_from_text`` makes the
start; several cartridges are read together with ``set_adapter([a, b])``, or for good with
``veneer.compose_cartridge_adapters``. Cost: ``length`` more keys in each attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.prompt import KeysValues, Prompt, PromptLearningConfig, split_layers
from veneer.core.registry import method
from veneer.methods.prefix_tuning import check_layers


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Settings of a cartridge.

    Attributes:
        num_frozen_tokens: how many of the first positions stay as they are.

    Raises:
        ValueError: at ``get_peft_model``: ``num_frozen_tokens`` outside 0 .. ``num_virtual_tokens``.
    """

    num_frozen_tokens: int = 1

    type: ClassVar[str | None] = "CARTRIDGE"

    def check(self) -> None:
        """Refuse more frozen tokens than there are."""
        super().check()
        if not 0 <= self.num_frozen_tokens <= (self.num_virtual_tokens or 0):
            raise ValueError(
                f"num_frozen_tokens={self.num_frozen_tokens} must lie between 0 and "
                f"num_virtual_tokens={self.num_virtual_tokens}."
            )


@method("CARTRIDGE", CartridgeConfig)
class Cartridge(Prompt):
    """A table of every layer's keys and values whose first rows are never trained."""

    whole = True
    fixed = frozenset({"frozen_embedding"})

    def __init__(self, model: nn.Module, config: CartridgeConfig):
        super().__init__(model, config)
        check_layers(model, "A cartridge")
        self.layers, self.heads = config.num_layers, config.num_attention_heads
        table = torch.randn(self.length, 2 * self.layers * config.token_dim)
        self.frozen = config.num_frozen_tokens
        self.frozen_embedding = nn.Parameter(table[: self.frozen], requires_grad=False)
        self.trainable_embedding = nn.Parameter(table[self.frozen :])

    def table(self) -> Tensor:
        """The whole table, as the file holds it."""
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def keys_values(self, batch: int, inputs: dict[str, Any]) -> KeysValues:
        return split_layers(self.table().expand(batch, -1, -1), self.layers, self.heads, self.halves)

    def outgoing(self) -> dict[str, Tensor]:
        """One tensor."""
        return {"prompt_embeddings": self.table().detach()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut where training begins."""
        table = tensors.get("prompt_embeddings")
        if table is None:
            return tensors
        rest = {k: v for k, v in tensors.items() if k != "prompt_embeddings"}
        return {"frozen_embedding": table[: self.frozen], "trainable_embedding": table[self.frozen :], **rest}
