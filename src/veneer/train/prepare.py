"""Everything a run needs, decided and proved before its first step: settings, tokens, adapter, schedule."""

from __future__ import annotations

import copy
import math
import os
import random
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import set_seed

from veneer.train import adapters, data, models, packing
from veneer.train.config import RunConfig
from veneer.train.evaluate import pad_token
from veneer.train.tokens import Renderer, Tokenised
from veneer.train.trainer import Collate


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
    renderer: Renderer
    train: Tokenised
    held: Tokenised
    adapter: Any
    base: Any
    schedule: Schedule
    collate: Collate
    feed: list[dict[str, list[int]]]
    """The rows of ``train`` as the trainer gets them, packed or not."""
    files: list[str]
    notices: list[str] = field(default_factory=list)


def prepare(config: RunConfig) -> Prepared:
    """Read the data, render and tokenise them, settle every ``auto``, and refuse what could not learn.

    Raises:
        ValueError: unusable rows or settings, nothing to learn, a tokenizer that does not fit the model.
        OSError: a file or model that is not there.
    """
    config = config.model_copy(deep=True)
    notices: list[str] = []
    adapter = adapters.build(config.adapter, notices)
    if str(adapter.task_type) != "CAUSAL_LM":
        raise ValueError(f"The adapter's task_type is {adapter.task_type}; `veneer train` trains CAUSAL_LM so far.")
    base = models.load_config(config.model)
    tokenizer = models.load_tokenizer(config.model)
    options = config.data
    examples = data.load(options.train, options.format, options.columns, options.bad_rows)
    if options.eval:
        held_examples = data.load(options.eval, options.format, options.columns, options.bad_rows)
        rows, held_rows, files = examples.rows, held_examples.rows, examples.files + held_examples.files
    else:
        rows, held_rows = data.split(examples.rows, options.holdout, config.train.seed)
        files = examples.files
    renderer = Renderer(
        tokenizer, examples.format, options.template, options.loss_on, options.system, data.continues(rows)
    )
    train = renderer.tokenise(rows, options.max_length, options.too_long)
    renderer.counts = type(renderer.counts)()
    held = renderer.tokenise(held_rows, options.max_length, options.too_long)
    if examples.skipped:
        notices.append(f"{len(examples.skipped)} unusable rows were left out; the first: {examples.skipped[0]}.")
    notices += _notices(train, held, config)
    _fits(train, base, config)
    settled = {"format": examples.format, "template": renderer.template, "loss_on": renderer.loss_on}
    config.data = config.data.model_copy(update=settled)
    if config.train.learning_rate == "auto":
        config.train.learning_rate = adapters.learning_rate(adapter, _hidden(base))
    feed = train.rows
    if options.packing:
        packing.check(adapter)
        feed = packing.pack(train.rows, options.max_length)
    schedule = _schedule(config, len(feed), bool(len(held)))
    adapter = adapters.build(config.adapter, steps=schedule.steps)
    config.adapter = adapters.resolved(adapter)
    config.eval.every, config.train.save_every = schedule.eval_every, schedule.save_every
    collate = Collate(pad_token(tokenizer), dtype=models.dtype_of(config.model, models.device_of(config.model)))
    return Prepared(config, tokenizer, renderer, train, held, adapter, base, schedule, collate, feed, files, notices)


def _notices(train: Tokenised, held: Tokenised, config: RunConfig) -> list[str]:
    counts, total, limit = train.counts, len(train.lengths), config.data.max_length
    texts = {
        "dropped_unlearnt": f"of {total} rows have no token to learn within data.max_length {limit} and were dropped.",
        "dropped_long": f"of {total} rows are longer than data.max_length {limit} and were dropped.",
        "truncated": f"of {total} rows are longer than data.max_length {limit} and were cut.",
        "split_at_boundary": "rows would have a token across the border of prompt and answer; it was split there.",
        "last_turn_only": "conversations are rewritten by the template as they go on; only their last answer counts.",
    }
    found = [f"{counts[key]} {text}" for key, text in texts.items() if counts[key]]
    unended = len(train) - counts["ends_learnt"]
    if unended > len(train) // 2 and config.data.format != "text":
        found.append(f"{unended} of {len(train)} rows do not learn an end token: the model may not know when to stop.")
    if not len(held):
        found.append("Nothing is held out, so there is no held-out loss and no best checkpoint; see data.holdout.")
    return found


def _fits(train: Tokenised, base: Any, config: RunConfig) -> None:
    largest = max(max(row["input_ids"]) for row in train.rows)
    text = base.get_text_config() if hasattr(base, "get_text_config") else base
    if (vocabulary := getattr(text, "vocab_size", None)) and largest >= vocabulary:
        raise ValueError(
            f"The tokenizer gives the token {largest}, and the model '{config.model.path}' knows only {vocabulary} "
            "tokens; they do not belong together."
        )


def _hidden(base: Any) -> int | None:
    return getattr(base.get_text_config() if hasattr(base, "get_text_config") else base, "hidden_size", None)


def _schedule(config: RunConfig, rows: int, held: bool) -> Schedule:
    world = int(os.environ.get("WORLD_SIZE", 1))
    batches = math.ceil(rows / (config.train.batch_size * world))
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
    """The model with its fresh adapter.

    Raises:
        ValueError: nothing would train, or the adapter does not fit the model.
    """
    config = prepared.config
    set_seed(config.train.seed)
    model: Any = models.load_model(config.model)
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapters.attach(model, copy.deepcopy(prepared.adapter))
    if adapters.starts_from_data(prepared.adapter):
        adapters.start(model, _batches(prepared))
    if not counts(model)[0]:
        raise ValueError("Nothing would train: the adapter has 0 trainable parameters on this model.")
    return model


def _batches(prepared: Prepared) -> list[dict[str, Tensor]]:
    """Training batches in an order of the seed's, for starts that read data; at most 256 of them."""
    rows, size = list(prepared.train.rows), prepared.config.train.batch_size
    random.Random(prepared.config.train.seed).shuffle(rows)
    return [prepared.collate(rows[i : i + size]) for i in range(0, min(len(rows), 256 * size), size)]


def counts(model: Any) -> tuple[int, int]:
    """(trainable parameters, all parameters)."""
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)
