"""How a mixture routes while it trains: figures of every step, and tables of layers and experts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.hf.routing import LayerUse, Tally, expert_names, watched
from veneer.train import adapters


def figures(uses: Sequence[LayerUse], prefix: str = "") -> dict[str, float]:
    """Mean entropy of the layers in nats, and the share of the busiest expert of any layer; empty for no layers."""
    if not uses:
        return {}
    entropy = sum(use.entropy for use in uses) / len(uses)
    busiest = max(share for use in uses for share in use.load)
    return {f"{prefix}routing_entropy": round(entropy, 5), f"{prefix}routing_busiest": round(busiest, 5)}


class RoutingLog(TrainerCallback):
    """Adds a mixture's figures to what is logged, and a line ``{"step", "routing"}`` to ``metrics.jsonl``.

    It has to stand before the callbacks that write and show what is logged. The tables are of the held-out rows; where
    nothing is held out, of the training rows of every ``eval_steps``-th step.

    Args:
        path: of metrics.jsonl.
        model: the adapted model.
    """

    def __init__(self, path: Path, model: Any):
        self.path, self.model = path, model
        self.names = expert_names(model)
        self.tally = Tally()
        self.step: dict[str, float] = {}
        self.open = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count from now on."""
        self.tally = self.open.enter_context(watched(self.model))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the step's figures, and start anew for an evaluation."""
        uses = self.tally.uses()
        self.tally.clear()
        self.step = figures(uses)
        with torch.no_grad():
            penalty = adapters.penalty(self.model)
        if penalty is not None:
            self.step["penalty"] = round(float(penalty), 6)
        last = state.global_step == state.max_steps
        if args.eval_strategy == "no" and (last or state.global_step % int(args.eval_steps or 1) == 0):
            self._write(uses, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """A step's figures, or those of the evaluation that just ended."""
        if "loss" in logs:
            logs |= self.step
        elif any(key.startswith("eval_") for key in logs) and (uses := self.tally.uses()):
            self.tally.clear()
            logs |= figures(uses, "eval_")
            self._write(uses, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self.open.close()

    def _write(self, uses: Sequence[LayerUse], state: TrainerState) -> None:
        if not state.is_world_process_zero or not uses:
            return
        layers = {
            use.path: {"load": [round(share, 4) for share in use.load], "entropy": round(use.entropy, 4)}
            for use in uses
        }
        line = {"step": state.global_step, "routing": {"experts": self.names, "layers": layers}}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
