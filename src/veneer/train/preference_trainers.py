"""DPO, KTO and reward models by TRL's trainers over rows tokenised here; ORPO by its loss.

The reference's log-probabilities are worked out once, before the first step, by the model that is trained.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.train import distributed
from veneer.train.policy import Policy, Reference, read, trl
from veneer.train.preference_tokens import COLUMNS

NAMES = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}


class Compared(Policy):
    """Stands before DPO's, KTO's and the reward model's trainer: rows are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with the model as its own reference."""
        with torch.no_grad(), self.reference():
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]


def make(
    task: str,
    model: Any,
    reference: Reference,
    arguments: dict[str, Any],
    rows: list[dict[str, Any]],
    held: list[dict[str, Any]],
    tokenizer: Any,
    optimiser: Any = None,
) -> Any:
    """The trainer of a task.

    Args:
        task: dpo, kto or reward.
        model: the adapted model.
        reference: the way to its reference.
        arguments: of TRL's config.
        rows: of ``preference_tokens``.
        held: held-out ones.
        tokenizer: the model's.
        optimiser: or None for the one that ``arguments`` names.

    Raises:
        ImportError: TRL is missing, or has no trainer for the task.
        ValueError: the adapter is a prompt.
    """
    settings = trl(f"{NAMES[task]}Config", task)(max_length=None, **arguments)
    cls = type(f"Adapted{NAMES[task]}Trainer", (Compared, trl(f"{NAMES[task]}Trainer", task)), {})
    with shared({"train": table(task, rows), "eval": table(task, held) if held else None}) as data:
        return cls(
            model,
            reference,
            task,
            args=settings,
            train_dataset=data["train"],
            eval_dataset=data["eval"],
            processing_class=tokenizer,
            optimizers=(optimiser, None),
        )


@contextlib.contextmanager
def shared(tables: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Within: the tables in a folder that all processes see, through which TRL hands the reference's answers round."""
    if distributed.processes() == 1:
        yield tables
        return
    from datasets import load_from_disk

    place: list[Any] = [tempfile.mkdtemp() if distributed.is_main() else None]
    torch.distributed.broadcast_object_list(place)
    if distributed.is_main():
        for name, one in tables.items():
            if one is not None:
                one.save_to_disk(f"{place[0]}/{name}")
    torch.distributed.barrier()
    yield {name: one and load_from_disk(f"{place[0]}/{name}") for name, one in tables.items()}
    torch.distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(place[0])  # what is mapped from it stays readable


def table(task: str, rows: list[dict[str, Any]]) -> Any:
    """The rows as TRL takes them."""
    from datasets import Dataset, disable_progress_bars  # slow to import, and TRL's own

    disable_progress_bars()
    if task == "reward":  # whole sequences
        sides = ("chosen_ids", "rejected_ids")
        return Dataset.from_list([{side: row["prompt_ids"] + row[side] for side in sides} for row in rows])
    return Dataset.from_list([{key: row[key] for key in COLUMNS if key in row} for row in rows])


class PairCollate:
    """Pairs to a right-padded batch: the chosen answers, then the rejected ones."""

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``answer_mask``: (2 pairs, length); ``labels``: (pairs, 2)."""
        # The Trainer counts what a step learns by its labels, the first of each row left out: one a pair remains.
        sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        length = max(len(asked) + len(answer) for asked, answer in sides)

        def column(parts: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([part + [filler] * (length - len(part)) for part in parts])

        return {
            "input_ids": column([asked + answer for asked, answer in sides], self.pad),
            "attention_mask": column([[1] * (len(asked) + len(answer)) for asked, answer in sides], 0),
            "answer_mask": column([[0] * len(asked) + [1] * len(answer) for asked, answer in sides], 0),
            "labels": torch.ones(len(rows), 2, dtype=torch.long),
        }

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """How many tokens a batch holds."""
        return read(batch)


def answer_logprobs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean log-probability of each answer's tokens, (2 pairs,)."""
    mask = batch["answer_mask"][:, 1:].bool()
    places = mask.any(0).nonzero().squeeze(1)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets, mask = batch["input_ids"][:, 1:][:, places], mask[:, places]
    kept = logits[:, -batch["input_ids"].shape[1] :][:, places].float()
    each = -F.cross_entropy(kept.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return (each * mask).sum(1) / mask.sum(1)
