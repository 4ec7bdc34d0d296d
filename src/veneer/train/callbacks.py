"""What a run shows and writes while it goes: live progress or plain lines, metrics.jsonl, a quiet end on Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.train import adapters, models

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24
BESIDE = {"reward": "reward", "rewards/margins": "margin", "margin": "margin"}
BESIDE |= {"rewards/accuracies": "right", "accuracy": "right"}
"""Figures that some tasks log with the loss, and what they are called beside it."""


def sparkline(values: list[float], width: int = WIDTH) -> str:
    """The course of ``values`` in one line of blocks, each the mean of its share."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    return "".join(BARS[round((m - low) / (high - low) * 7)] if high > low else BARS[3] for m in means)


def duration(seconds: float) -> str:
    """``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def size(amount: float) -> str:
    """Bytes as ``512 B``, ``3.9 MB``, ``1.2 GB``."""
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.2f} GB"


class Metrics(TrainerCallback):
    """Every logged figure as one line of ``metrics.jsonl``, flushed at once."""

    def __init__(self, path: Path, seen: Callable[[], int], device: torch.device):
        self.path, self.seen, self.device = path, seen, device
        self.started = self.before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines that a resumed run will write again."""
        self.started = time.monotonic()
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    one = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run was killed
                    continue
                if one["step"] <= state.global_step:
                    kept.append(line)
                    self.before = one.get("seconds", self.before)
        self.path.write_text("".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Append one line; the first process does, for all."""
        if not state.is_world_process_zero:
            return
        seconds = self.before + time.monotonic() - self.started
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **logs}
        line |= {"tokens": self.seen(), "seconds": round(seconds, 2), "memory": models.memory(self.device)}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Progress(TrainerCallback):
    """One live line in a terminal, plain lines elsewhere.

    Args:
        console: where to.
        mode: ``live``, ``plain``, ``off``, or ``auto``: live in a terminal.
        seen: the tokens trained on so far.
        device: whose memory is shown.
        score: the held-out figure that is shown.
    """

    def __init__(self, console: Console, mode: str, seen: Callable[[], int], device: torch.device, score: str = "loss"):
        self.console, self.seen, self.device, self.score = console, seen, device, score
        self.mode = mode if mode != "auto" else "live" if console.is_terminal else "plain"
        self.losses: list[float] = []
        self.recent: deque[tuple[float, int, int]] = deque(maxlen=20)
        self.live: Live | None = None
        self.spoken = 0.0
        self.held = ""
        self.beside: list[str] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the live line."""
        self.recent.append((time.monotonic(), self.seen(), state.global_step))
        self.losses = [one["loss"] for one in state.log_history if "loss" in one]
        if self.mode == "live":
            self.live = Live(self._line(state), console=self.console, refresh_per_second=4, transient=False)
            self.live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the time."""
        self.recent.append((time.monotonic(), self.seen(), state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Show the newest loss."""
        figures = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        if self.score in figures:
            self.held = f"held-out {'' if self.score == 'loss' else self.score + ' '}{figures[self.score]:.4f}"
            if "eval_routing_entropy" in logs:
                self.held += f"  gates' entropy {logs['eval_routing_entropy']:.2f}"
                self.held += f", busiest expert {logs['eval_routing_busiest']:.0%}"
            if self.mode == "plain":
                self.console.print(f"step {state.global_step}/{state.max_steps}  {self.held}", highlight=False)
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.beside = [f"{label} {logs[key]:.3f}" for key, label in BESIDE.items() if key in logs]
        if self.live:
            self.live.update(self._line(state))
        elif self.mode == "plain" and "loss" in logs and self._due(state):
            self.console.print(self._text(state), highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last line standing."""
        self.close(state)

    def close(self, state: TrainerState | None = None) -> None:
        """Give the terminal back, also after an error."""
        if self.live:
            if state is not None:
                self.live.update(self._line(state))
            self.live.stop()
            self.live = None

    def _due(self, state: TrainerState) -> bool:
        """A line about every twentieth of the run, at the ends, and at least every half minute."""
        now = time.monotonic()
        every = max(1, state.max_steps // 20)
        if state.global_step in (1, state.max_steps) or state.global_step % every == 0 or now - self.spoken > 30:
            self.spoken = now
            return True
        return False

    def _figures(self, state: TrainerState) -> tuple[float, float]:
        """(tokens a second, seconds left), over the last steps."""
        (t0, n0, s0), (t1, n1, s1) = self.recent[0], self.recent[-1]
        if s1 == s0:
            return 0.0, 0.0
        return (n1 - n0) / (t1 - t0), (state.max_steps - state.global_step) * (t1 - t0) / (s1 - s0)

    def _text(self, state: TrainerState) -> str:
        speed, left = self._figures(state)
        loss = f"loss {self.losses[-1]:.4f}" if self.losses else "loss -"
        parts = [f"step {state.global_step}/{state.max_steps}", loss, *self.beside]
        if speed:
            parts += [f"{speed:,.0f} tokens/s", f"{duration(left)} left"]
        return "  ".join([*parts, size(models.memory(self.device))])

    def _line(self, state: TrainerState) -> Table:
        done = state.global_step / max(1, state.max_steps)
        width = WIDTH if self.console.width >= 110 else WIDTH // 2
        filled = round(done * width)
        line = Table.grid(padding=(0, 2))
        for _ in range(3):
            line.add_column(no_wrap=True)
        bar = Text("━" * filled, "green") + Text("━" * (width - filled), "bright_black")
        line.add_row(bar, Text(self._text(state)), Text(self.held, "cyan"))
        if len(self.losses) > 1:
            line.add_row(Text(sparkline(self.losses, width), "magenta"), Text("loss so far", "bright_black"), "")
        return line


class Adapters(TrainerCallback):
    """Tells the method that an optimiser step was taken, while the gradients are still there."""

    def __init__(self, model: Any):
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """AdaLoRA's budget and the like."""
        adapters.after_step(self.model, state.global_step + 1)


class Interrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the step at hand, with a checkpoint; the second one ends it at once."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.asked = say, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT inside the block, where this is the main thread."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            self.say("Stopping after this step; press Ctrl-C again to stop at once.")

        try:
            before = signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread: whoever runs it handles signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, once asked to."""
        if self.asked:
            control.should_save = control.should_training_stop = True
