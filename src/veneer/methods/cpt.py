"""CPT: Context-aware Prompt Tuning (Blau, Kimhi, Belinkov, Bronstein, Baskin, 2024, arXiv:2410.17222).

    P = E(context) + D        ||D_i|| <= eps sqrt(dim / 2048)        P, D (length, dim), D = 0 at the start

The context is few-shot examples as token ids, each token with its type: 4k+1 input template, 4k+2 input, 4k+3 output
template, 4k+4 label of example k. Templates move within ``opt_projection_format_epsilon``, inputs within
``opt_projection_epsilon``, labels never; rows are projected back before each forward. The loss counts the examples'
labels too, with ``decay`` each example ``opt_loss_decay_factor`` times the next one. At the start it is in-context
prompting. The centre E(context) is the model's own, so a saved prompt trains on within the same ball.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.config import TaskType
from veneer.core.prompt import Prompt, PromptLearningConfig, vocabulary_rows
from veneer.core.registry import method


@dataclass
class CPTConfig(PromptLearningConfig):
    """Settings of context-aware prompt tuning; the three lists have one entry for each token of the context.

    Attributes:
        cpt_token_ids: the context as token ids.
        cpt_mask: 1 for each of its tokens that is read.
        cpt_tokens_type_mask: the type of each token, as above.
        opt_weighted_loss_type: "decay" weights the examples' labels, "none" does not.
        opt_loss_decay_factor: what an example weighs beside the next one.
        opt_projection_epsilon: how far input tokens may move.
        opt_projection_format_epsilon: how far template tokens may move.
        tokenizer_name_or_path: kept for the reader; nothing is tokenised here.

    Raises:
        ValueError: at ``get_peft_model``: another task than CAUSAL_LM, or lists of different lengths.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: str | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    type: ClassVar[str | None] = "CPT"

    def check(self) -> None:
        """Refuse lists that do not belong together."""
        super().check()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"CPT is for task_type='CAUSAL_LM' alone, not {self.task_type}.")
        for name in ("cpt_token_ids", "cpt_tokens_type_mask", "cpt_mask"):
            value = getattr(self, name)
            if value is None and name == "cpt_mask":
                continue
            if value is None or len(value) != self.num_virtual_tokens:
                raise ValueError(
                    f"{name} must have num_virtual_tokens={self.num_virtual_tokens} entries, one for each token of the "
                    f"context, not {'none' if value is None else len(value)}."
                )
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ValueError(f"opt_weighted_loss_type must be 'none' or 'decay', not {self.opt_weighted_loss_type!r}.")


@method("CPT", CPTConfig)
class CPT(Prompt):
    """The embeddings of a context, moved within small balls."""

    wants = frozenset({"input_type_mask"})

    def __init__(self, model: nn.Module, config: CPTConfig):
        super().__init__(model, config)
        centre = vocabulary_rows(model, torch.tensor(config.cpt_token_ids))  # (length, dim)
        self.prompt_embeddings = nn.Parameter(centre.clone())
        self.register_buffer("centre", centre, persistent=False)
        types = torch.tensor(config.cpt_tokens_type_mask)
        eps, format_eps = config.opt_projection_epsilon or 0.0, config.opt_projection_format_epsilon or 0.0
        radius = torch.tensor([0.0, format_eps, eps, format_eps])[types % 4] * (centre.shape[1] / 2048) ** 0.5
        self.register_buffer("radius", radius, persistent=False)
        self.register_buffer("types", types, persistent=False)
        self.register_buffer("ids", torch.tensor(config.cpt_token_ids), persistent=False)
        self.decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        self.moved = False

    def projected(self) -> Tensor:
        """Every row within its ball around the context's embedding."""
        moved = self.prompt_embeddings - self.centre
        length = moved.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return self.centre + moved * (self.radius[:, None] / length).clamp(max=1)

    def embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor:
        rows = self.prompt_embeddings
        self.moved |= self.training
        if self.moved:
            with torch.no_grad():
                rows.data.copy_(self.projected())
            free = (self.radius > 0)[:, None]
            rows = torch.where(free, rows, rows.detach())
        return rows.expand(batch, -1, -1)

    def after_forward(self, output: Any, given: dict[str, Any]) -> Any:
        """With the loss of the method: the context's labels count, and older examples less."""
        labels = given.get("labels")
        if labels is None or getattr(output, "loss", None) is None or labels.shape[1] <= self.length:
            return output
        batch, text = labels.shape[0], labels.shape[1] - self.length
        types = given.get("input_type_mask")
        types = torch.full((batch, text), 4, device=labels.device) if types is None else types.to(labels.device)
        last = int(self.types.max())
        types = torch.cat([self.types.expand(batch, -1), torch.where(types > 0, types + last, types)], 1)
        known = torch.cat([self.ids.expand(batch, -1), labels[:, self.length :]], 1)
        known = torch.where(types % 4 == 0, known, -100)[:, 1:]
        logits = output.logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), known, ignore_index=-100, reduction="none")  # (batch, tokens)
        newest = types.amax(1, keepdim=True)
        weight = self.decay ** ((newest - types[:, 1:]) / 4).float()
        output.loss = (weight * each).sum() / (known != -100).sum()
        return output

    def outgoing(self) -> dict[str, Tensor]:
        """The rows as they are read."""
        return {"prompt_embeddings": self.projected().detach() if self.moved else self.prompt_embeddings.detach()}
