"""Prompt: text the model has read already, as trainable embeddings or as keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Prompt(nn.Module):
    """One prompt method's parameters for one model.

    A method overrides ``embeddings`` (rows read before the text) or ``cache`` (keys and values read before the text).

    Attributes:
        length: number of virtual tokens.
    """

    length: int

    @classmethod
    def on(cls, model: nn.Module, config: Any) -> Prompt:
        """Build the prompt for this model.

        Raises:
            ValueError: the model has no input embeddings or its sizes cannot be read.
        """
        return cls(model, config)

    def embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor | None:
        """(batch, length, dim) rows read before the text, or None for a method of keys and values."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the model reads its embeddings."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's embedding dtype."""
        return next(self.parameters()).dtype
