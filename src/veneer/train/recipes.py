"""A run from what ``prepare`` decided to an adapter: train, and answer before and after.

``veneer plan`` shows a prepared run and ``veneer train`` runs that same object, so what is printed is what happens.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from veneer.hf.routing import routes
from veneer.train import adapters, distributed, document, html, loggers, models
from veneer.train.callbacks import Adapters, Interrupt, Metrics, Progress, size
from veneer.train.config import USED_BY, RunConfig
from veneer.train.optim import OPTIMISERS
from veneer.train.prepare import Prepared, build, counts
from veneer.train.provenance import header
from veneer.train.routing_log import RoutingLog
from veneer.train.trainer import checkpoints


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
    task: str = "sft"
    score: str = "loss"
    """The figure that tells which of two models is better."""
    higher: bool = False
    """Whether more of it is better."""
    before: dict[str, float] = field(default_factory=dict)
    """Every figure on the held-out rows, by the base alone."""
    after: dict[str, float] = field(default_factory=dict)
    tables: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Title -> row -> column -> share: what else the task says of the held-out rows at the end."""
    best_step: int | None = None
    samples: list[Sample] = field(default_factory=list)
    held_out: bool = True
    asked: str = "prompts"
    """What the samples are."""
    writes: bool = True
    """Whether one can talk with it."""
    seconds: float = 0.0
    compute_seconds: float = 0.0
    """On a CPU the seconds it computed, which do not depend on what else the machine does; elsewhere as ``seconds``."""
    peak_memory: int = 0
    adapter_bytes: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    stopped_at: str | None = None
    """The checkpoint to resume from, if Ctrl-C ended the run."""

    @property
    def loss_before(self) -> float | None:
        """The base's held-out loss."""
        return self.before.get("loss")

    @property
    def loss_after(self) -> float | None:
        """The held-out loss with the adapter."""
        return self.after.get("loss")


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
    start = _open(prepared, folder, resume or distributed.restarted())
    models.threads(config.train.threads)
    distributed.join(config, models.device_of(config.model))
    model = build(prepared)
    device = next(model.parameters()).device
    trainable, total = counts(model)
    model = distributed.spread(model, config)
    outcome = Outcome(str(folder), 0, trainable, total, held_out=bool(len(prepared.held)))
    outcome.task, outcome.score, outcome.higher = config.task, prepared.score.name, prepared.score.higher
    outcome.asked, outcome.writes = prepared.task.prompts, prepared.task.adapter_type == "CAUSAL_LM"
    trainer, progress, interrupt = _trainer(prepared, model, device, console)
    outcome.before, outcome.samples = _before(prepared, model, trainer, folder, fresh=start is None)
    began, computed = time.monotonic(), time.process_time()
    try:
        with interrupt.listening():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except Exception as error:
        if (explained := loggers.explain(error, list(config.log.report_to))) is not None:
            raise explained from error
        raise
    finally:
        progress.close()
    outcome.seconds, outcome.steps = time.monotonic() - began, trainer.state.global_step
    outcome.compute_seconds = time.process_time() - computed if device.type == "cpu" else outcome.seconds
    if interrupt.asked and outcome.steps < prepared.schedule.steps:
        outcome.stopped_at = str(checkpoints(folder / "checkpoints")[-1])
        return outcome
    if trainer.state.best_model_checkpoint:
        outcome.best_step = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    return _finished(prepared, model, trainer, outcome, trainer.is_world_process_zero())


def without_training(prepared: Prepared, make: Callable[[Any], Any]) -> Outcome:
    """What ``run`` leaves behind, for adapters that are combined and not trained.

    Args:
        prepared: what ``prepare`` decided; its adapter block is only written down.
        make: puts the combination on the loaded base, and gives the adapted model.

    Raises:
        ValueError: the folder holds another run.
    """
    config, folder = prepared.config, Path(prepared.config.output.dir)
    _open(prepared, folder, False)
    models.threads(config.train.threads)
    set_seed(config.train.seed)
    began, computed = time.monotonic(), time.process_time()
    model = make(prepared.task.load(prepared)).eval()
    outcome = Outcome(str(folder), 0, *counts(model), held_out=bool(len(prepared.held)))
    outcome.seconds, outcome.compute_seconds = time.monotonic() - began, time.process_time() - computed
    outcome.task, outcome.score, outcome.higher = config.task, prepared.score.name, prepared.score.higher
    outcome.asked, outcome.writes = prepared.task.prompts, prepared.task.adapter_type == "CAUSAL_LM"
    outcome.before, outcome.samples = _before(prepared, model, None, folder, fresh=True)
    (folder / "metrics.jsonl").touch()
    return _finished(prepared, model, None, outcome, True)


def _finished(prepared: Prepared, model: Any, trainer: Any, outcome: Outcome, main: bool) -> Outcome:
    """Save, measure, answer, and write the report."""
    folder = Path(outcome.folder)
    model.save_pretrained(str(folder), is_main_process=main)
    if main:
        prepared.tokenizer.save_pretrained(str(folder))
    outcome.after = _measured(prepared, model, trainer)
    outcome.tables = prepared.task.tables(prepared) if outcome.after else {}
    for sample, text in zip(outcome.samples, prepared.task.answers(prepared, model), strict=True):
        sample.after = text.strip()
    outcome.peak_memory = models.peak_memory(next(model.parameters()).device)
    files = [*folder.glob("adapter_model.*"), *folder.glob("*/adapter_model.*")]  # a mixture brings its experts
    outcome.adapter_bytes = sum(file.stat().st_size for file in files)
    outcome.data = _summary(prepared)
    if main:
        (folder / "report.json").write_text(json.dumps(_plain(outcome), indent=2, ensure_ascii=False) + "\n")
        html.write(folder)
    return outcome


def _trainer(prepared: Prepared, model: Any, device: torch.device, console: Console) -> tuple[Any, Progress, Interrupt]:
    config, schedule, held = prepared.config, prepared.schedule, bool(len(prepared.held))
    best = held and config.eval.best
    own = OPTIMISERS.get(config.train.optimizer)
    arguments: dict[str, Any] = {
        "output_dir": str(Path(config.output.dir) / "checkpoints"),
        "max_steps": schedule.steps,
        "per_device_train_batch_size": config.train.batch_size,
        "per_device_eval_batch_size": config.eval.batch_size or config.train.batch_size,
        "gradient_accumulation_steps": config.train.accumulate,
        "learning_rate": float(config.train.learning_rate),
        "lr_scheduler_type": config.train.schedule,
        "warmup_steps": schedule.warmup,
        "optim": config.train.optimizer if own is None else "adamw_torch",
        "weight_decay": config.train.weight_decay,
        "max_grad_norm": config.train.clip,
        "seed": config.train.seed,
        "logging_steps": config.log.every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if held else "no",
        "eval_steps": schedule.eval_every,
        "save_strategy": "steps",
        "save_steps": schedule.save_every,
        "save_total_limit": config.train.keep,
        "load_best_model_at_end": best,
        "metric_for_best_model": f"eval_{prepared.score.name}" if best else None,
        "greater_is_better": prepared.score.higher if best else None,
        "fp16": device.type == "cuda" and next(model.get_base_model().parameters()).dtype == torch.float16,
        "dataloader_num_workers": config.train.workers,
        "dataloader_pin_memory": device.type == "cuda",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        **loggers.arguments(config),
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        **distributed.arguments(config),
    }
    rate, decay = float(config.train.learning_rate), config.train.weight_decay
    optimiser = own(model, rate, weight_decay=decay) if own else None
    trainer = prepared.task.trainer(prepared, model, arguments, optimiser)
    loggers.place(trainer, Path(config.output.dir))
    trainer.remove_callback(PrinterCallback)
    metrics = Metrics(Path(config.output.dir) / "metrics.jsonl", lambda: trainer.tokens_seen, device)
    progress = Progress(console, config.log.progress, lambda: trainer.tokens_seen, device, prepared.score.name)
    interrupt = Interrupt(console.print)
    if routes(model):
        trainer.callback_handler.callbacks.insert(0, RoutingLog(metrics.path, model))
    callbacks = [Adapters(model), metrics, progress, interrupt, *distributed.callbacks(config, model)]
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
    if not distributed.is_main():
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
    stored, now = document.read(written).values, config.settings()
    if (was := stored.get("task", "sft")) != config.task:
        raise ValueError(f"The run in '{written.parent}' has the task {was} and cannot be resumed as {config.task}.")
    fixed = {section: now[section] for section in ("model", "data", "adapter", *USED_BY) if section in now}
    fixed["train"] = {k: now["train"][k] for k in ("seed", "optimizer")}
    changed = distributed.changed_batch(stored, now) + [
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


def _measured(prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
    return prepared.task.measure(prepared, model, trainer) if len(prepared.held) else {}


def _before(
    prepared: Prepared, model: Any, trainer: Any, folder: Path, fresh: bool
) -> tuple[dict[str, float], list[Sample]]:
    """Figures and answers of the base, or of the adapter that the run goes on from; kept on disk for a resumed run."""
    file = folder / "before.json"
    if not fresh and file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        return stored["metrics"], [Sample(**one) for one in stored["samples"]]
    with nullcontext() if "start" in prepared.config.adapter else model.disable_adapter():
        metrics, answers = _measured(prepared, model, trainer), prepared.task.answers(prepared, model)
    samples = [
        Sample(shown, right, text.strip())
        for (shown, right), text in zip(prepared.task.questions(prepared), answers, strict=True)
    ]
    if distributed.is_main():
        file.write_text(json.dumps({"metrics": metrics, "samples": [vars(s) for s in samples]}, ensure_ascii=False))
    return metrics, samples


def _summary(prepared: Prepared) -> dict[str, Any]:
    """The data in a few figures, for the report."""
    train = prepared.train
    rows = {
        "files": ", ".join(prepared.files),
        "rows": f"{len(train):,} to train on, {len(prepared.held):,} held out",
        **dict(prepared.task.facts(prepared)),
    }
    if train.lengths:
        lengths = f"{min(train.lengths):,} to {max(train.lengths):,} tokens, {train.counts['truncated']:,} cut"
        rows["row length"] = lengths
    return rows


def _plain(outcome: Outcome) -> dict[str, Any]:
    values = {**vars(outcome), "loss_before": outcome.loss_before, "loss_after": outcome.loss_after}
    values |= {"samples": [vars(sample) for sample in outcome.samples]}
    return {**values, "adapter_size": size(outcome.adapter_bytes)}
