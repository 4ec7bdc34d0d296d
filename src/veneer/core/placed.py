"""Modules of a whole model, which lie where it wants them."""

from __future__ import annotations

import torch
from torch import nn


class Placed(nn.Module):
    """Parameters that belong to no layer; ``at_device`` and ``at_dtype`` are those of the model's embeddings."""

    at_device: torch.device
    at_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where its parameters are wanted."""
        return self.at_device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model reads and writes."""
        return self.at_dtype
