"""Loggers besides metrics.jsonl: transformers' own callbacks, told where to write and what the run is called."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback

from veneer.train.config import RunConfig

# Where each reads a project's name; transformers passes it to trackio itself.
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}


def check(names: Sequence[str]) -> None:
    """Refuse loggers that are not installed, before the run begins.

    Raises:
        ImportError: one is missing; says how to install it.
    """
    for name in names:
        found = [one for one in (name, "tensorboardX") if one == name or name == "tensorboard"]
        if not any(importlib.util.find_spec(one) for one in found):
            raise ImportError(f"log.report_to {name} needs the package {name}: pip install {name}.")


def arguments(config: RunConfig) -> dict[str, Any]:
    """Keywords of ``TrainingArguments``; what a logger reads from its environment is set there, unless it is."""
    log, name = config.log, config.log.name or Path(config.output.dir).resolve().name
    for logger in log.report_to:
        if logger in PROJECT_VARIABLES:
            os.environ.setdefault(PROJECT_VARIABLES[logger], log.project)
    return {"report_to": log.report_to or "none", "run_name": name, "project": log.project}


def explain(error: Exception, names: Sequence[str]) -> ValueError | None:
    """A logger's own exception (no key, no server, no room) in a sentence, or None if it is not a logger's."""
    name = type(error).__module__.partition(".")[0]
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"log.report_to {name} failed: {reason[0]}") if name in names else None


def place(trainer: Any, folder: Path) -> None:
    """Let tensorboard write beside the run's other files, unless its environment names another place."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")
