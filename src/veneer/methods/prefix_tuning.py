"""Prefix tuning (Li, Liang, 2021, arXiv:2101.00190); with a trained head P-tuning v2 (Liu et al., 2022, 2110.07602).

    K_l' = [PK_l ; K_l]    V_l' = [PV_l ; V_l]        PK_l, PV_l (length, kv_heads * head_dim), for every layer l

All of them are one table (length, 2 * layers * kv_heads * head_dim), which each layer's self-attention sees as text
read before (rotary positions are not applied to it; the text itself starts at position ``length``). With
``prefix_projection`` the table is W2 tanh(W1 E + b1) + b2 of a small table E while training; the file holds the
computed table and, for training to resume, W1, W2 and E. P-tuning v2 is this with ``modules_to_save`` for the head.
Cost: ``length`` more keys in each attention, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.prompt import KeysValues, PromptLearningConfig, split_layers
from veneer.core.registry import method
from veneer.methods.p_tuning import Encoded


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Settings of prefix tuning.

    Attributes:
        init_weights: None (normal draws) or "zero".
        encoder_hidden_size: width of the table's perceptron; None: the model's.
        prefix_projection: make the table by a perceptron while training.

    Raises:
        ValueError: at ``get_peft_model``: ``init_weights`` other than None (normal draws) or "zero".
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    type: ClassVar[str | None] = "PREFIX_TUNING"

    def check(self) -> None:
        """Refuse an unknown start."""
        super().check()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None (normal draws) or 'zero', not {self.init_weights!r}.")


def check_layers(model: nn.Module, name: str) -> None:
    """Refuse a model with layers that have no keys and values.

    Raises:
        ValueError: names the kinds of layers.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    kinds = sorted({str(k) for k in getattr(config, "layer_types", None) or () if "attention" not in str(k)})
    kinds += sorted({str(k) for k in getattr(config, "layer_types", None) or () if "linear" in str(k)})
    if kinds or getattr(config, "kv_lora_rank", None):
        what = f"layers of the kinds {', '.join(kinds)}" if kinds else "compressed keys and values"
        raise ValueError(f"{name} gives every layer keys and values, but {type(model).__name__} has {what}; use prompt "
                         "tuning there.")  # fmt: skip


class Projection(nn.Module):
    """W2 tanh(W1 E + b1) + b2."""

    def __init__(self, length: int, dim: int, hidden: int, out: int, zero: bool):
        super().__init__()
        self.embedding = nn.Embedding(length, dim)
        self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, out))
        if zero:
            nn.init.zeros_(self.transform[2].weight)
            nn.init.zeros_(self.transform[2].bias)

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)


@method("PREFIX_TUNING", PrefixTuningConfig)
class PrefixTuning(Encoded):
    """A table of every layer's keys and values."""

    whole = True

    def __init__(self, model: nn.Module, config: PrefixTuningConfig):
        super().__init__(model, config)
        check_layers(model, "Prefix tuning")
        self.layers, self.heads = config.num_layers, config.num_attention_heads
        out = 2 * self.layers * config.token_dim
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim
        sizes = self.length, config.token_dim, config.encoder_hidden_size, out, config.init_weights == "zero"
        if config.prefix_projection:
            self.encode_with(lambda: Projection(*sizes))
        else:
            zero = config.init_weights == "zero"
            self.prompt_embeddings = nn.Parameter((torch.zeros if zero else torch.randn)(self.length, out))

    def keys_values(self, batch: int, inputs: dict[str, Any]) -> KeysValues:
        table = self.table().expand(batch, -1, -1)
        return split_layers(table, self.layers, self.heads, self.halves)
