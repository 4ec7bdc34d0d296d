"""A run from what ``prepare`` decided to an adapter: train, and answer before and after.

``veneer plan`` shows a prepared run and ``veneer train`` runs that same object, so what is printed is what happens.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainingArguments

from veneer.train import adapters, document, html, models
from veneer.train.callbacks import Adapters, Interrupt, Metrics, Progress, size
from veneer.train.config import RunConfig
from veneer.train.evaluate import answer, end_tokens
from veneer.train.optim import OPTIMISERS
from veneer.train.prepare import Prepared, build, counts
from veneer.train.provenance import header
from veneer.train.tokens import IGNORED, Tokenised
from veneer.train.trainer import AdapterTrainer, checkpoints, held_out_loss


@dataclass
class Sample:
    """A prompt that was answered before and after."""

    prompt: str
    expected: str
    before: str
    after: str = ""


@dataclass
class Outcome:
    """What came of a run."""

    folder: str
    steps: int
    trainable: int
    total: int
    loss_before: float | None = None
    loss_after: float | None = None
    best_step: int | None = None
    samples: list[Sample] = field(default_factory=list)
    held_out: bool = True
    seconds: float = 0.0
    compute_seconds: float = 0.0
    """On a CPU the seconds it computed, which do not depend on what else the machine does; elsewhere as ``seconds``."""
    peak_memory: int = 0
    adapter_bytes: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    stopped_at: str | None = None
    """The checkpoint to resume from, if Ctrl-C ended the run."""


def run(prepared: Prepared, console: Console, resume: bool = False) -> Outcome:
    """Train, and leave in the output folder: adapter, tokenizer, run.yaml, metrics.jsonl, report.json, checkpoints.

    Args:
        prepared: what ``prepare`` decided.
        console: where progress goes.
        resume: go on from the last whole checkpoint in the output folder.

    Raises:
        ValueError: the folder holds another run, or nothing would train.
        KeyboardInterrupt: a second Ctrl-C; the last checkpoint is whole.
    """
    config, folder = prepared.config, Path(prepared.config.output.dir)
    start = _open(prepared, folder, resume)
    models.threads(config.train.threads)
    model = build(prepared)
    device = next(model.parameters()).device
    trainable, total = counts(model)
    outcome = Outcome(str(folder), 0, trainable, total, held_out=bool(len(prepared.held)))
    outcome.loss_before, outcome.samples = _before(prepared, model, folder, console, fresh=start is None)
    trainer, progress, interrupt = _trainer(prepared, model, device, console)
    began, computed = time.monotonic(), time.process_time()
    try:
        with interrupt.listening():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        progress.close()
    outcome.seconds, outcome.steps = time.monotonic() - began, trainer.state.global_step
    outcome.compute_seconds = time.process_time() - computed if device.type == "cpu" else outcome.seconds
    if interrupt.asked and outcome.steps < prepared.schedule.steps:
        outcome.stopped_at = str(checkpoints(folder / "checkpoints")[-1])
        return outcome
    if trainer.state.best_model_checkpoint:
        outcome.best_step = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    main = trainer.is_world_process_zero()
    model.save_pretrained(str(folder), is_main_process=main)
    if main:
        prepared.tokenizer.save_pretrained(str(folder))
    _after(prepared, model, outcome)
    outcome.peak_memory = models.peak_memory(device)
    outcome.adapter_bytes = sum(file.stat().st_size for file in folder.glob("adapter_model.*"))
    outcome.data = _summary(prepared)
    if main:
        (folder / "report.json").write_text(json.dumps(_plain(outcome), indent=2, ensure_ascii=False) + "\n")
        html.write(folder)
    return outcome


def _trainer(
    prepared: Prepared, model: Any, device: torch.device, console: Console
) -> tuple[AdapterTrainer, Progress, Interrupt]:
    config, schedule, held = prepared.config, prepared.schedule, bool(len(prepared.held))
    best = held and config.eval.best
    own = OPTIMISERS.get(config.train.optimizer)
    arguments = TrainingArguments(
        output_dir=str(Path(config.output.dir) / "checkpoints"),
        max_steps=schedule.steps,
        per_device_train_batch_size=config.train.batch_size,
        per_device_eval_batch_size=config.eval.batch_size or config.train.batch_size,
        gradient_accumulation_steps=config.train.accumulate,
        learning_rate=float(config.train.learning_rate),
        lr_scheduler_type=config.train.schedule,
        warmup_steps=schedule.warmup,
        optim=config.train.optimizer if own is None else "adamw_torch",
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.clip,
        seed=config.train.seed,
        logging_steps=config.log.every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if held else "no",
        eval_steps=schedule.eval_every,
        save_strategy="steps",
        save_steps=schedule.save_every,
        save_total_limit=config.train.keep,
        load_best_model_at_end=best,
        metric_for_best_model="eval_loss" if best else None,
        greater_is_better=False if best else None,
        fp16=device.type == "cuda" and next(model.get_base_model().parameters()).dtype == torch.float16,
        dataloader_num_workers=config.train.workers,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=config.log.report_to or "none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )
    rows = prepared.held.rows if held else None
    optimiser = own(model, float(config.train.learning_rate)) if own else None
    trainer = AdapterTrainer(model, arguments, prepared.collate, prepared.feed, rows, optimizers=(optimiser, None))
    trainer.remove_callback(PrinterCallback)
    metrics = Metrics(Path(config.output.dir) / "metrics.jsonl", lambda: trainer.tokens_seen, device)
    progress = Progress(console, config.log.progress, lambda: trainer.tokens_seen, device)
    interrupt = Interrupt(console.print)
    callbacks = [Adapters(), metrics, progress, interrupt]
    if config.eval.patience and best:
        callbacks.append(EarlyStoppingCallback(config.eval.patience))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, progress, interrupt


def _open(prepared: Prepared, folder: Path, resume: bool) -> Path | None:
    """Make the output folder and write run.yaml; the checkpoint to go on from, if there is one and it is wanted."""
    written = folder / "run.yaml"
    earlier = checkpoints(folder / "checkpoints")
    if resume and earlier:
        _same_run(prepared.config, written)
        return earlier[-1]
    if resume:
        prepared.notices.append(
            f"There is no whole checkpoint in '{folder}' yet, so the run starts from its beginning."
        )
    elif (earlier or (folder / adapters.WEIGHTS_FILE).exists()) and not prepared.config.output.overwrite:
        raise ValueError(
            f"'{folder}' holds a run already. Go on with it by --resume, replace it by --overwrite, or name another "
            "folder with --out."
        )
    if int(os.environ.get("RANK", 0)):
        return None  # the first process clears the folder, for all
    for old in [*(folder / "checkpoints").glob("checkpoint-*")]:
        shutil.rmtree(old)
    for name in ("metrics.jsonl", "before.json", "report.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(header(prepared.files) + prepared.config.dump(), encoding="utf-8")
    return None


def _same_run(config: RunConfig, written: Path) -> None:
    """Refuse to go on with other data, another model or another adapter than the checkpoint's."""
    stored, now = document.read(written).values, config.model_dump(mode="json")
    fixed = {"model": now["model"], "data": now["data"], "adapter": now["adapter"]}
    fixed["train"] = {k: now["train"][k] for k in ("batch_size", "accumulate", "seed", "optimizer")}
    changed = [
        f"{section}.{key} was {stored.get(section, {}).get(key)!r} and is {value!r}"
        for section, values in fixed.items()
        for key, value in values.items()
        if stored.get(section, {}).get(key) != value
    ]
    if changed:
        raise ValueError(
            f"The run in '{written.parent}' cannot be resumed with other settings: {'; '.join(changed)}. "
            f"Resume with `veneer train {written} --resume`, or start anew in another folder."
        )


def _questions(prepared: Prepared) -> list[int]:
    """Rows to ask about: spread over the held-out ones, or over the training ones where nothing is held out."""
    rows = len(prepared.held) or len(prepared.train)
    wanted = min(prepared.config.eval.prompts, rows)
    return [round(i * (rows - 1) / max(1, wanted - 1)) for i in range(wanted)]


def _answers(prepared: Prepared, model: Any) -> list[str]:
    asked = prepared.held if len(prepared.held) else prepared.train
    special = [t for row in prepared.train.rows[:1] for t in row["labels"] if t in prepared.renderer.specials]
    ends = end_tokens(model, prepared.tokenizer, special[-1] if special else None)
    return [
        answer(
            model,
            prepared.tokenizer,
            prepared.renderer.prompt(asked.sources[i]),
            max_new_tokens=prepared.config.eval.max_new_tokens,
            ends=ends,
            bos=prepared.renderer.bos,
        )
        for i in _questions(prepared)
    ]


def _loss(prepared: Prepared, model: Any) -> float | None:
    if not len(prepared.held):
        return None
    batch = prepared.config.eval.batch_size or prepared.config.train.batch_size
    return held_out_loss(model, prepared.held.rows, prepared.collate, batch)


def _before(
    prepared: Prepared, model: Any, folder: Path, console: Console, fresh: bool
) -> tuple[float | None, list[Sample]]:
    """Loss and answers of the bare base; kept on disk, so that a resumed run need not ask again."""
    file = folder / "before.json"
    if not fresh and file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        return stored["loss"], [Sample(**one) for one in stored["samples"]]
    asked = prepared.held if len(prepared.held) else prepared.train
    with model.disable_adapter():
        loss, answers = _loss(prepared, model), _answers(prepared, model)
    samples = []
    for i, text in zip(_questions(prepared), answers, strict=True):
        learnt = [t for t in asked.rows[i]["labels"] if t != IGNORED]
        expected = prepared.tokenizer.decode(learnt, skip_special_tokens=True)
        samples.append(Sample(_shown(prepared, i, asked), expected.strip(), text.strip()))
    file.write_text(json.dumps({"loss": loss, "samples": [vars(s) for s in samples]}, ensure_ascii=False))
    return loss, samples


def _shown(prepared: Prepared, i: int, asked: Tokenised) -> str:
    source = asked.sources[i]
    if source.messages is None or prepared.renderer.template != "chat":
        return prepared.renderer.prompt(source).strip()
    return next((str(m["content"]) for m in reversed(source.messages) if m["role"] == "user"), source.question).strip()


def _after(prepared: Prepared, model: Any, outcome: Outcome) -> None:
    outcome.loss_after = _loss(prepared, model)
    for sample, text in zip(outcome.samples, _answers(prepared, model), strict=True):
        sample.after = text.strip()


def _summary(prepared: Prepared) -> dict[str, Any]:
    """The data in a few figures, for the report."""
    train, options = prepared.train, prepared.config.data
    return {
        "files": ", ".join(prepared.files),
        "format": f"{options.format}, rendered by {options.template}, learnt: {options.loss_on}",
        "rows": f"{len(train):,} to train on, {len(prepared.held):,} held out",
        "tokens": f"{train.tokens:,}, of which {train.learnt:,} are learnt",
        "row length": f"{min(train.lengths):,} to {max(train.lengths):,} tokens, {train.counts['truncated']:,} cut",
    }


def _plain(outcome: Outcome) -> dict[str, Any]:
    values = {**vars(outcome), "samples": [vars(sample) for sample in outcome.samples]}
    return {**values, "adapter_size": size(outcome.adapter_bytes)}
