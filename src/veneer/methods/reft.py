"""ReFT: Representation Fine-Tuning (Wu, Arora, Wang, Geiger, Jurafsky, Manning, Potts, 2024, arXiv:2404.03592).

    LoReFT:  h' = h + R^T (W h + b - R h)        R (r, dim) with orthonormal rows, W (r, dim), b (r,)
    DiReFT:  h' = h + W_2^T (W_1 h + b)          W_1, W_2 (r, dim)

On what a block gives, at chosen positions of the prompt alone: ``positions="f7+l7"`` are its first and its last seven
tokens; generated tokens are left alone. Where the call has labels, the prompt is what is not learnt (-100). W starts as
R (DiReFT: W_2 at zero), so the start is the base, where the paper starts W at random. Dropout falls on the edit, not on
the state. Cost: 4 r dim a token and block.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.bottleneck import widths

BLOCKS = r".*\.(layers|h|block|layer)\.\d+"
"""Where transformers keep their blocks."""


@dataclass
class ReftConfig(LayerConfig):
    """Settings of ReFT.

    Attributes:
        r: rank of the edit.
        variant: "loreft" or "direft".
        positions: "f7+l7", "f3", "l1", or "all" (every token of the prompt).
        tied: first and last positions share one edit.
        reft_dropout: on the edit.
        init_weights: False starts W (DiReFT: W_2) at random, as the paper does.

    Raises:
        ValueError: at ``get_peft_model``: an unknown variant, or positions that cannot be read.
    """

    r: int = 8
    variant: str = "loreft"
    positions: str = "f7+l7"
    tied: bool = True
    reft_dropout: float = 0.0
    init_weights: bool = True

    type: ClassVar[str | None] = "REFT"

    def places(self, model_type: str | None) -> str:
        """All blocks."""
        return BLOCKS

    def check(self) -> None:
        """Refuse what cannot be read."""
        if self.variant not in ("loreft", "direft"):
            raise ValueError(f"variant must be 'loreft' or 'direft', not {self.variant!r}.")
        if not re.fullmatch(r"all|f\d+|l\d+|f\d+\+l\d+", self.positions):
            raise ValueError(f"positions must be like 'f7+l7', 'f3', 'l1' or 'all', not {self.positions!r}.")
        if self.r < 1:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")

    @property
    def ends(self) -> tuple[int, int]:
        """(first, last): how many tokens from either end."""
        found = {part[0]: int(part[1:]) for part in self.positions.split("+") if part != "all"}
        return found.get("f", 0), found.get("l", 0)


class Edit(nn.Module):
    """One edit of a state, by its parameters."""

    def __init__(self, dim: int, config: ReftConfig):
        super().__init__()
        if config.r > dim:
            raise ValueError(f"r={config.r} exceeds the width {dim} of the states it edits; choose a smaller one.")
        rows = nn.init.orthogonal_(torch.empty(config.r, dim))
        self.direct = config.variant == "direft"
        self.reft_W = nn.Parameter(
            rows.clone() if self.direct or config.init_weights else torch.randn_like(rows) * dim**-0.5
        )
        self.reft_b = nn.Parameter(torch.zeros(config.r))
        zero = self.direct and config.init_weights
        self.reft_R = nn.Parameter(torch.zeros_like(rows) if zero else rows)

    @property
    def R(self) -> Tensor:
        """(r, dim): the rows as they act, orthonormal for LoReFT whatever training made of the parameter."""
        if self.direct:
            return self.reft_R
        q, upper = torch.linalg.qr(self.reft_R.T.float())
        return (q * upper.diagonal().sign()).T.to(self.reft_R.dtype)

    def forward(self, h: Tensor) -> Tensor:
        R = self.R
        low = F.linear(h, self.reft_W, self.reft_b)
        return (low if self.direct else low - F.linear(h, R)) @ R


@method("REFT", ReftConfig)
class Reft(Adapter):
    """An edit of what a block gives, at chosen tokens of the prompt."""

    whole_modules = True
    wants = frozenset({"attention_mask", "labels", "past_key_values"})

    def __init__(self, site: Site, config: ReftConfig):
        super().__init__(site, config)
        self.first, self.last = config.ends
        self.everywhere, self.p = config.positions == "all", config.reft_dropout
        dim = widths(site)[1]
        self.edit = Edit(dim, config)
        self.edit_last = None if config.tied or not (self.first and self.last) else Edit(dim, config)

    def forward(self, x: Tensor, base: Base) -> Any:
        y = base(x)
        h = y[0] if isinstance(y, tuple) else y
        chosen = self._chosen(h)
        if chosen is None:
            return y
        at_first, at_last = chosen
        state = h.to(self.dtype)
        change = self.edit(state) * (at_first if self.edit_last is not None else at_first | at_last)[..., None]
        if self.edit_last is not None:
            change = change + self.edit_last(state) * (at_last & ~at_first)[..., None]
        new = h + F.dropout(change, self.p, self.training).to(h.dtype)
        return (new, *y[1:]) if isinstance(y, tuple) else new

    def _chosen(self, h: Tensor) -> tuple[Tensor, Tensor] | None:
        """(batch, tokens) twice: among the prompt's first and among its last tokens; None after the prompt."""
        given, tokens = self.site.inputs, h.shape[-2]
        mask, labels, past = (given.get(k) for k in ("attention_mask", "labels", "past_key_values"))
        longer = mask is not None and mask.dim() == 2 and mask.shape[1] > tokens
        if longer or (past is not None and past.get_seq_length() > tokens):
            return None
        shape = h.shape[:-1]
        ones = torch.ones(shape, dtype=torch.bool, device=h.device)
        prompt = mask.bool() if mask is not None and mask.shape == shape else ones
        if labels is not None and labels.shape == shape:
            asked = prompt & (labels == -100)
            prompt = torch.where(asked.any(-1, keepdim=True), asked, prompt)
        if self.everywhere:
            return prompt, torch.zeros_like(prompt)
        rank = prompt.long().cumsum(-1)  # 1 at the prompt's first token
        total = rank[..., -1:]
        return prompt & (rank <= self.first), prompt & (rank > total - self.last)

    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """R as it acts, so that the file means the same to a reader that does not orthonormalise."""
        acting = {"edit.reft_R": self.edit} | ({} if self.edit_last is None else {"edit_last.reft_R": self.edit_last})
        return tensors | {k: e.R.detach() for k, e in acting.items() if k in tensors}
