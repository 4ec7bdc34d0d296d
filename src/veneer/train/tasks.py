"""What the tasks of ``veneer train`` differ in: one entry each, found by the name in ``task:``.

``prepare``, ``recipes`` and ``plan`` hold what all tasks share and ask the entry for the rest: which rows it takes and
how they become features, how the base is loaded, which trainer runs, what is measured, what is shown before and after.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainingArguments

from veneer.engine.targets import HEADS
from veneer.train import adapters, distributed, models
from veneer.train.config import RunConfig
from veneer.train.data import Example
from veneer.train.tokens import IGNORED, Tokenised
from veneer.train.trainer import AdapterTrainer, Losses, held_out_loss

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared


@dataclass(frozen=True)
class Metric:
    """A figure taken on held-out rows."""

    name: str
    higher: bool = False
    """Whether more of it is better."""

    def better(self, a: float, b: float) -> bool:
        """Whether ``a`` is better than ``b``."""
        return a > b if self.higher else a < b


LOSS = Metric("loss")


@dataclass
class Material:
    """What a task makes its features from. ``config`` and ``base`` may be settled by it, ``notices`` added to."""

    config: RunConfig
    adapter: Any
    base: Any
    tokenizer: Any
    rows: list[Example]
    held: list[Example]
    format: str
    notices: list[str]


@dataclass
class Features:
    """Rows as the model reads them.

    Attributes:
        train: the training rows.
        held: the held-out ones.
        collate: rows to a batch; None where the task's trainer has its own way.
        feed: the training rows as the trainer gets them, where that is not ``train.rows``.
        renderer: whatever else the task wants to find again in ``prepared.renderer``.
        epoch: how many times ``batch_size`` counts down in an epoch, where that is not the number of rows.
    """

    train: Tokenised
    held: Tokenised
    collate: Any = None
    feed: list[Any] | None = None
    renderer: Any = None
    epoch: int | None = None


class Task(ABC):
    """A task. What most tasks do alike is done here; an entry overrides what it does otherwise."""

    adapter_type = "CAUSAL_LM"
    """The adapter's ``task_type``."""
    auto = "AutoModelForCausalLM"
    """transformers' class that loads the base."""
    formats: tuple[str, ...] = ()
    """Keys of ``formats.FORMATS`` that it can learn from."""
    metrics: tuple[Metric, ...] = (LOSS,)
    """What it measures; unless ``eval.metric`` says otherwise the first one tells which model is better."""
    prompts = "prompts"
    """What the things shown before and after are called."""
    trained_by: type[AdapterTrainer] = AdapterTrainer
    """The loop."""

    @abstractmethod
    def features(self, material: Material) -> Features:
        """Rows as the model reads them.

        Raises:
            ValueError: nothing to learn, or settings that do not fit the data.
        """

    @abstractmethod
    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """(what is shown, what would be right) for each row of ``asked``."""

    @abstractmethod
    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """What ``model`` makes of these rows now."""

    @abstractmethod
    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """(what, how much) about the data, for the plan and the report."""

    def respond(
        self, config: RunConfig, tokenizer: Any, model: Any, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What ``veneer generate`` says to each row: columns to add to it, ``answer`` among them.

        Raises:
            NotImplementedError: the task's models are asked as any language model is.
        """
        raise NotImplementedError(f"{type(self).__name__} answers as a language model.")

    # ---- model and adapter ------------------------------------------------------------------------------------------
    def learning_rate(self, adapter: Any, hidden: int | None) -> float:
        """The rate when none is set."""
        return adapters.learning_rate(adapter, hidden)

    def settle(self, config: RunConfig, base: Any, tokenizer: Any) -> Any:
        """The base's config with what the task's settings say of the model, such as the names of classes."""
        return base

    def load(self, prepared: Prepared, dtype: Any = None) -> Any:
        """The base with its weights, and with a new head where the task has one."""
        return self.open(prepared.config, prepared.base, dtype)

    def open(self, config: RunConfig, base: Any, dtype: Any = None) -> Any:
        """Likewise, for a run that is over."""
        heads = HEADS.get(self.adapter_type, ())
        return models.load_model(config.model, dtype, self.auto, base, heads, distributed.loading(config))

    def starting(self, prepared: Prepared) -> Any:
        """What makes batches for a start that reads data: the model is called with them."""
        return prepared.collate

    def skeleton(self, prepared: Prepared, dtype: Any) -> Any:
        """The base without its weights, on the meta device."""
        heads = HEADS.get(self.adapter_type, ())
        return models.meta_model(prepared.config.model, prepared.base, dtype, self.auto, heads)

    # ---- training ---------------------------------------------------------------------------------------------------
    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """The loss of ``model``, which is the adapted one.

        Raises:
            NotImplementedError: the task's trainer has a loss of its own; then it overrides ``step`` too.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own.")

    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """Every metric on the held-out rows."""
        losses = self.losses(prepared, model)
        return {"loss": held_out_loss(model, prepared.held.rows, prepared.collate, batch_size(prepared), losses)}

    def tables(self, prepared: Prepared) -> dict[str, dict[str, dict[str, float]]]:
        """What the report shows of the last ``measure`` besides its figures: title -> row -> column -> share."""
        return {}

    def trainer(self, prepared: Prepared, model: Any, arguments: dict[str, Any], optimiser: Any) -> Any:
        """The trainer, ready to run. A trainer of another kind takes its checkpoints from ``AdapterCheckpoints``.

        Args:
            prepared: the run.
            model: the adapted model.
            arguments: keywords of ``TrainingArguments``.
            optimiser: or None for the one that ``arguments`` names.
        """
        return self.trained_by(
            model,
            TrainingArguments(**arguments),
            prepared.collate,
            prepared.feed,
            prepared.held.rows if len(prepared.held) else None,
            optimizers=(optimiser, None),
            losses=self.losses(prepared, model),
            measure=partial(self.measure, prepared, model),
        )

    # ---- the plan ---------------------------------------------------------------------------------------------------
    def inputs(self, prepared: Prepared, model: Any) -> dict[str, Any]:
        """The largest batch without its contents, for counting what a forward pass keeps."""
        rows, length = largest(prepared)
        return {key: torch.ones(rows, length, dtype=torch.long) for key in ("input_ids", "attention_mask")}

    def output(self, output: Any) -> Tensor:
        """Where the loss begins: (anything, classes)."""
        return output.logits.flatten(0, -2)

    def rehearsal(self, prepared: Prepared, model: Any) -> Tensor:
        """A loss of the largest batch that makes and keeps what the real one does; its value means nothing."""
        flat = self.output(model(**self.inputs(prepared, model))).float()
        return F.cross_entropy(flat, torch.zeros(len(flat), dtype=torch.long))

    def step(self, prepared: Prepared, model: Any) -> tuple[Callable[[], Tensor], int]:
        """(a function that gives the loss of the largest batch, how many tokens that is)."""
        device = next(model.parameters()).device
        rows = sorted(prepared.feed, key=lambda row: -len(row["input_ids"]))[: prepared.config.train.batch_size]
        batch = {name: value.to(device) for name, value in prepared.collate(rows).items()}
        losses = self.losses(prepared, model)

        def loss() -> Tensor:
            total, count = losses(model, batch)
            return total / count

        return loss, prepared.collate.tokens(batch)

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The first row token by token: its text, and whether it is learnt."""
        row = prepared.train.rows[0]
        return spelled(prepared.tokenizer, row["input_ids"], [label != IGNORED for label in row["labels"]])


def batch_size(prepared: Prepared) -> int:
    """Rows that are measured at once."""
    return prepared.config.eval.batch_size or prepared.config.train.batch_size


def spelled(tokenizer: Any, ids: Sequence[int], learnt: Sequence[bool]) -> list[tuple[str, bool]]:
    """(text, whether it is learnt) of each token."""
    pieces: list[tuple[str, bool]] = []
    done = ""
    for end, green in enumerate(learnt, 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("�") and end < len(ids):  # a character of several tokens: shown with its last one
            continue
        pieces.append((text[len(done) :], green))
        done = text
    return pieces


def largest(prepared: Prepared) -> tuple[int, int]:
    """(rows, length) of the largest batch."""
    length = max(len(row["input_ids"]) for row in prepared.feed)
    return min(prepared.config.train.batch_size, len(prepared.feed)), length


def asked(prepared: Prepared) -> list[int]:
    """Rows to ask about: spread over the held-out ones, or over the training ones where nothing is held out."""
    rows = len(prepared.held) or len(prepared.train)
    wanted = min(prepared.config.eval.prompts, rows)
    return [round(i * (rows - 1) / max(1, wanted - 1)) for i in range(wanted)]


def asked_of(prepared: Prepared) -> Tokenised:
    """The rows that ``asked`` numbers."""
    return prepared.held if len(prepared.held) else prepared.train


# Where each task's entry stands; a module is imported when its task is asked for.
TABLE = {
    "sft": "sft:Sft",
    "seq2seq": "seq2seq:Seq2Seq",
    "sequence-classification": "classification:SequenceClassification",
    "token-classification": "tagging:TokenClassification",
    "embeddings": "embeddings:Embeddings",
    "dpo": "preference:Dpo",
    "kto": "preference:Kto",
    "orpo": "orpo:Orpo",
    "reward": "reward_model:Reward",
    "grpo": "reinforce:Grpo",
    "rloo": "reinforce:Rloo",
}


def find(name: str) -> Task:
    """The entry of a task.

    Raises:
        ImportError: a package that only this task needs is not installed.
    """
    module, _, entry = TABLE[name].partition(":")
    return getattr(importlib.import_module(f"veneer.train.{module}"), entry)()
