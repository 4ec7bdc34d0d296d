"""The task orpo, by our own loss: TRL 1.16 has ORPO among its experiments only."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.train.preference import Preference
from veneer.train.preference_trainers import answer_logprobs
from veneer.train.tasks import Task, batch_size
from veneer.train.trainer import AdapterTrainer, Losses

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared


class OddsLoss:
    """See ``orpo``; keeps what is logged of each batch until ``figures`` is cleared."""

    def __init__(self, weight: float):
        self.weight, self.figures = weight, defaultdict[str, list[float]](list)

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, found = orpo(answer_logprobs(model, batch), self.weight)
        for name, value in found.items():
            self.figures[name].append(value.item())
        return loss, torch.tensor(len(batch["labels"]))


class OrpoTrainer(AdapterTrainer):
    """Logs the figures of the pairs beside their loss."""

    losses: OddsLoss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The figures' means since the last line."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self.losses.figures.items()}
            self.losses.figures.clear()
        super().log(logs, *args, **kwargs)


class Orpo(Preference):
    """SFT on the chosen answer with a term against the rejected one (Hong et al. 2024); there is no reference."""

    losses_known = ("orpo",)
    trained_by = OrpoTrainer
    trainer = Task.trainer  # our loop and not TRL's

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """See ``orpo``."""
        return OddsLoss(prepared.config.preference.beta)

    @torch.no_grad()
    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """The loss and the figures over all held-out pairs."""
        rows, training = prepared.held.rows, model.training
        size, device = batch_size(prepared), next(model.parameters()).device
        model.eval()
        parts = []
        for start in range(0, len(rows), size):
            batch = {k: v.to(device) for k, v in prepared.collate(rows[start : start + size]).items()}
            parts.append(answer_logprobs(model, batch).chunk(2))
        model.train(training)
        both = torch.cat([torch.cat(side) for side in zip(*parts, strict=True)])
        loss, figures = orpo(both, prepared.config.preference.beta)
        return {"loss": loss.item() / len(rows), **{name: value.item() for name, value in figures.items()}}

    def compared_with(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Nothing: that is the point of it."""
        return [("reference", "none; the answers' odds are compared with each other")]


def orpo(logprobs: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """ORPO (Hong et al. 2024):  L = -log p(y_w)  -  w log sigmoid(log odds(y_w) - log odds(y_l)),  odds = p / (1 - p),

    with p the geometric mean of an answer's token probabilities.

    Args:
        logprobs: mean log-probabilities, chosen ones first, (2 pairs,).
        weight: of the second term, lambda in the paper.

    Returns:
        The sum over the pairs, and means of what is logged.
    """
    chosen, rejected = logprobs.chunk(2)
    odds_w, odds_l = (p - torch.log1p(-torch.exp(p.clamp(max=-1e-6))) for p in (chosen, rejected))
    loss = (-chosen - weight * F.logsigmoid(odds_w - odds_l)).sum()
    return loss, {
        "rewards/margins": weight * (chosen - rejected).detach().mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "logps/chosen": chosen.detach().mean(),
        "logps/rejected": rejected.detach().mean(),
    }
