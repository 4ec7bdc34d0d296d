"""Reward models: the task reward, and its models asked for their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.train.config import RunConfig
from veneer.train.evaluate import Session, pad_token
from veneer.train.preference import Preference
from veneer.train.preference_rows import Said
from veneer.train.preference_tokens import answered, ids_of
from veneer.train.sft import Sft
from veneer.train.tasks import LOSS, Features, Material, Metric, asked, asked_of
from veneer.train.tokens import Renderer
from veneer.train.trainer import Losses

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared


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


class Reward(Preference):
    """A model that gives a number to an answer (Bradley and Terry): more to the chosen one than to the rejected one."""

    adapter_type = "SEQ_CLS"
    auto = "AutoModelForSequenceClassification"
    metrics = (LOSS, Metric("accuracy", True), Metric("margin", True))
    prompts = "pairs"

    def features(self, material: Material) -> Features:
        """With one number at the end of the base."""
        self.settle(material.config, material.base, material.tokenizer)
        return super().features(material)

    def settle(self, config: Any, base: Any, tokenizer: Any) -> Any:
        """One number, read at the last token before the padding."""
        base.num_labels, base.pad_token_id = 1, pad_token(tokenizer)
        return base

    def respond(self, config: Any, tokenizer: Any, model: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``reward``, the number of a row's ``answer`` or ``completion``, or of the last turn of its ``messages``."""
        found = scored(model, tokenizer, [_said(row) for row in rows], config.data)
        return [{"answer": row.get("answer", ""), "reward": value} for row, value in zip(rows, found, strict=True)]

    def learning_rate(self, adapter: Any, hidden: int | None) -> float:
        """SFT's: there is a head to learn, and no language to lose."""
        return Sft.learning_rate(self, adapter, hidden)

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """Whether rewards are kept around zero."""
        return {"center_rewards_coefficient": prepared.config.preference.centre}

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """-log sigmoid(reward of the chosen - reward of the rejected)."""

        def total(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            chosen, rejected = rewards(model, batch).chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected).sum(), torch.tensor(len(batch["labels"]))

        return total

    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Pairs: which one is to have the higher reward."""
        source = asked_of(prepared)
        decode = partial(prepared.tokenizer.decode, skip_special_tokens=True)
        found = []
        for i in asked(prepared):
            row = source.rows[i]
            found.append((source.sources[i].question, f"{decode(row['chosen_ids'])}  >  {decode(row['rejected_ids'])}"))
        return found

    @torch.no_grad()
    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """Both rewards of each pair."""
        source, device, training = asked_of(prepared), next(model.parameters()).device, model.training
        model.eval()
        found = []
        for i in asked(prepared):
            batch = {k: v.to(device) for k, v in prepared.collate([source.rows[i]]).items()}
            chosen, rejected = rewards(model, batch).tolist()
            found.append(f"{chosen:.2f}  {'>' if chosen > rejected else '<'}  {rejected:.2f}")
        model.train(training)
        return found

    def compared_with(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Nothing: rewards stand for themselves."""
        return []


def _said(row: dict[str, Any]) -> tuple[Any, Any]:
    """(prompt, answer) of a row."""
    if isinstance(row.get("messages"), list):
        return row["messages"][:-1], row["messages"][-1:]
    answer = row.get("answer", row.get("completion"))
    if "prompt" not in row or answer is None:
        raise ValueError("A reward model reads rows with 'prompt' and 'answer', or with 'messages' that end with it.")
    return row["prompt"], answer


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
