"""What one of two processes does in ``test_distributed``: runs, one after the other, as ``veneer train`` would.

    torchrun --standalone --nproc-per-node 2 distributed_worker.py JOBS.json

JOBS.json holds a list of {"words": [...], "resume": bool, "dies": {"rank", "step"} or null}; what a job says when it is
refused goes into ``refused.txt`` of its output folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback

from veneer.train import adapters, config, distributed, models, recipes
from veneer.train.prepare import prepare


class Death(TrainerCallback):
    """Kills one process at the beginning of a step, once."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def on_step_begin(self, args, state, control, **kwargs):
        if int(os.environ["RANK"]) == self.rank and state.global_step == self.step and not distributed.restarted():
            os.kill(os.getpid(), signal.SIGKILL)


def job(words: list[str], resume: bool = False, dies: dict | None = None) -> None:
    prepared = prepare(config.load(None, [], words, adapters.problems))
    if dies:
        make = prepared.task.trainer

        def mortal(*args):
            trainer = make(*args)
            trainer.add_callback(Death(**dies))
            return trainer

        prepared.task.trainer = mortal
    try:
        recipes.run(prepared, Console(quiet=True), resume)
    except (ValueError, ImportError) as error:
        folder = Path(prepared.config.output.dir)
        folder.mkdir(parents=True, exist_ok=True)
        if distributed.is_main():
            (folder / "refused.txt").write_text(str(error))


def main() -> None:
    torch.set_num_threads(1)
    models.quiet()
    for one in json.loads(Path(sys.argv[1]).read_text()):
        job(**one)
    distributed.leave()


if __name__ == "__main__":
    main()
