"""Everything a run needs, decided and proved before its first step: settings, tokens, adapter, schedule."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import set_seed

from veneer.train import adapters, data, distributed, loggers, models, optimisers, tasks
from veneer.train.config import RunConfig
from veneer.train.tasks import Material, Metric, Task
from veneer.train.tokens import Tokenised

# The task that a stored adapter config speaks of.
TASK_OF = {
    "CAUSAL_LM": "sft",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "FEATURE_EXTRACTION": "embeddings",
}


@dataclass(frozen=True)
class Schedule:
    """A run counted in optimiser steps."""

    steps: int
    per_epoch: int
    warmup: int
    eval_every: int
    save_every: int


@dataclass
class Prepared:
    """A run with every open choice made. ``config`` holds no ``auto`` that was decided here."""

    config: RunConfig
    tokenizer: Any
    renderer: Any
    """What the task's ``features`` left there for itself."""
    train: Tokenised
    held: Tokenised
    adapter: Any
    base: Any
    schedule: Schedule
    collate: Any
    feed: list[Any]
    """The rows of ``train`` as the trainer gets them, packed or not."""
    files: list[str]
    notices: list[str]
    task: Task
    score: Metric
    """What tells which of two models is better."""


def prepare(config: RunConfig) -> Prepared:
    """Read the data, render and tokenise them, settle every ``auto``, and refuse what could not learn.

    Raises:
        ValueError: unusable rows or settings, nothing to learn, a tokenizer that does not fit the model.
        OSError: a file or model that is not there.
    """
    config = config.model_copy(deep=True)
    notices: list[str] = []
    task = tasks.find(config.task)
    score = score_of(config)
    loggers.check(config.log.report_to)
    optimisers.check(config.train.optimizer)
    adapter = adapters.build(config.adapter, notices, task_type=task.adapter_type)
    if str(adapter.task_type) != task.adapter_type:
        raise ValueError(
            f"The adapter's task_type is {adapter.task_type}, and task {config.task} needs {task.adapter_type}; set "
            f"adapter.task_type, or task: {TASK_OF.get(str(adapter.task_type), 'another one')}."
        )
    base = models.load_config(config.model)
    tokenizer = models.load_tokenizer(config.model)
    options = config.data
    examples = data.load(options.train, options.format, options.columns, options.bad_rows, task.formats)
    if options.eval:
        held = data.load(options.eval, options.format, options.columns, options.bad_rows, task.formats)
        rows, held_rows, files = examples.rows, held.rows, examples.files + held.files
    else:
        rows, held_rows = data.split(examples.rows, options.holdout, config.train.seed)
        files = examples.files
    if examples.skipped:
        notices.append(f"{len(examples.skipped)} unusable rows were left out; the first: {examples.skipped[0]}.")
    made = task.features(Material(config, adapter, base, tokenizer, rows, held_rows, examples.format, notices))
    if not len(made.held):
        notices.append(
            f"Nothing is held out, so there is no held-out {score.name} and no best checkpoint; see data.holdout."
        )
    config.data = config.data.model_copy(update={"format": examples.format})
    if config.train.learning_rate == "auto":
        config.train.learning_rate = task.learning_rate(adapter, _hidden(base))
    feed = made.train.rows if made.feed is None else made.feed
    schedule = _schedule(config, made.epoch or len(feed), bool(len(made.held)))
    adapter = adapters.build(config.adapter, steps=schedule.steps, task_type=task.adapter_type)
    if "start" not in config.adapter:
        config.adapter = adapters.resolved(adapter)
    config.eval.every, config.train.save_every = schedule.eval_every, schedule.save_every
    if distributed.launched():
        config.distributed.processes = distributed.processes()
    return Prepared(
        config, tokenizer, made.renderer, made.train, made.held, adapter, base, schedule, made.collate, feed, files,
        notices, task, score,
    )  # fmt: skip


def score_of(config: RunConfig) -> Metric:
    """What tells which of two models is better: ``eval.metric``, or the task's first one.

    Raises:
        ValueError: the task does not measure it.
    """
    task, wanted = tasks.find(config.task), config.eval.metric
    found = next((one for one in task.metrics if wanted in ("auto", one.name)), None)
    if found is None:
        known = ", ".join(one.name for one in task.metrics)
        raise ValueError(f"eval.metric is '{wanted}'; task {config.task} measures {known}.")
    return found


def _hidden(base: Any) -> int | None:
    return getattr(base.get_text_config() if hasattr(base, "get_text_config") else base, "hidden_size", None)


def _schedule(config: RunConfig, rows: int, held: bool) -> Schedule:
    batches = math.ceil(rows / (config.train.batch_size * distributed.replicas(config)))
    per_epoch = math.ceil(batches / config.train.accumulate)
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * per_epoch))
    warmup = config.train.warmup
    auto = max(1, math.ceil(steps / 5))
    every = auto if config.eval.every == "auto" else int(config.eval.every)
    save = (every if held else auto) if config.train.save_every == "auto" else int(config.train.save_every)
    if held and config.eval.best and save % every:
        raise ValueError(
            f"train.save_every {save} is not a multiple of eval.every {every}, so the best step might have no "
            "checkpoint; change one of them, or set eval.best: false."
        )
    return Schedule(steps, per_epoch, round(warmup * steps) if warmup < 1 else int(warmup), every, save)


def build(prepared: Prepared) -> Any:
    """The model with its adapter: a fresh one, or the one that the run goes on from.

    Raises:
        ValueError: nothing would train, or the adapter does not fit the model.
    """
    config = prepared.config
    set_seed(config.train.seed)
    model: Any = prepared.task.load(prepared)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    start = config.adapter.get("start")
    model = adapters.attach(model, copy.deepcopy(prepared.adapter), start)
    if not start and adapters.starts_from_data(prepared.adapter):
        adapters.start(model, _batches(prepared))
    if not counts(model)[0]:
        raise ValueError("Nothing would train: the adapter has 0 trainable parameters on this model.")
    return model


def _batches(prepared: Prepared) -> list[dict[str, Tensor]]:
    """Training batches in an order of the seed's, for starts that read data; at most 256 of them."""
    rows, size = list(prepared.train.rows), prepared.config.train.batch_size
    random.Random(prepared.config.train.seed).shuffle(rows)
    collate = prepared.task.starting(prepared)
    return [collate(rows[i : i + size]) for i in range(0, min(len(rows), 256 * size), size)]


def counts(model: Any) -> tuple[int, int]:
    """(trainable parameters, all parameters)."""
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)
