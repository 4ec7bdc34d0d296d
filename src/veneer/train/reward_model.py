"""A reward model, trained by ``task: reward``, asked for its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.train.config import RunConfig
from veneer.train.evaluate import Session, pad_token
from veneer.train.preference_rows import Said
from veneer.train.preference_tokens import answered, ids_of
from veneer.train.tokens import Renderer


def rewards(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """One number a row, (rows,)."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].float()


@torch.no_grad()
def scored(
    model: Any, tokenizer: Any, said: Sequence[tuple[Said, Said]], data: Any, batch_size: int = 8
) -> list[float]:
    """The model's number for each (prompt, answer), read as they were in training.

    Args:
        model: with its adapter.
        tokenizer: the model's.
        said: texts, or turns.
        data: the ``data`` section of the run: template, system message, longest row.
        batch_size: answers at once.
    """
    renderer = Renderer(tokenizer, "prompt", data.template, "completion", data.system)
    rows = [ids[: data.max_length] for ids in ids_of([answered("", *pair) for pair in said], renderer)]
    device, pad, training = next(model.parameters()).device, pad_token(tokenizer), model.training
    model.eval()
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        some = [torch.tensor(ids) for ids in rows[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(one)] for one in some])
        found += rewards(model, {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}).tolist()
    model.train(training)
    return found


class RewardModel:
    """The numbers as a reward function.

    Args:
        path: the output folder of a ``task: reward`` run.
        batch_size: answers at once.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: it is the adapter of another task.
    """

    def __init__(self, path: str, batch_size: int = 8):
        self.session, self.batch_size = Session(None, path), batch_size
        if self.session.recipe.get("task") != "reward":
            raise ValueError(f"'{path}' is no reward model; train one with task: reward.")
        self.data = RunConfig.model_validate(self.session.recipe).data

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """One number for each answer."""
        said = list(zip(prompts, completions, strict=True))
        return scored(self.session.model, self.session.tokenizer, said, self.data, self.batch_size)
