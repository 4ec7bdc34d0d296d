"""What the tests of preference and reinforcement share: rows about colours, settings, and where runs are cut off."""

import json
import os
import signal
import socket
import traceback

import torch
from rich.console import Console

from veneer.train import adapters, config
from veneer.train.prepare import prepare

COLOURS = [("sky", "blue", "red"), ("grass", "green", "blue"), ("rose", "red", "green")]


def rows(kind, count=40):
    found = []
    for i in range(count):
        thing, right, wrong = COLOURS[i % 3]
        asked = f"What colour is the {thing} {i // 3}"
        good, bad = f"The {thing} is {right}", f"no {wrong}"
        found.append(
            {
                "pairs": {"prompt": asked, "chosen": good, "rejected": bad},
                "labels": {"prompt": asked, "completion": bad if i % 2 else good, "label": not i % 2},
                "prompts": {"prompt": asked, "answer": right},
            }[kind]
        )
    return found


def write(file, found):
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


KINDS = {"kto": "labels", "grpo": "prompts", "rloo": "prompts"}


def settings(task, base, folder, *words, found=None):
    data = write(folder / f"{task}.jsonl", found or rows(KINDS.get(task, "pairs")))
    fixed = ["--task", task, "--model", str(base), "--data", str(data), "--out", str(folder / "out")]
    fixed += ["--eval.prompts", "1"] + (["--eval.max-new-tokens", "4"] if task != "reward" else [])
    return config.load(None, [], [*fixed, *words], adapters.problems)


def prepared(task, base, folder, *words, found=None):
    return prepare(settings(task, base, folder, *words, found=found))


def quiet():
    return Console(file=open(os.devnull, "w"))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["loss"] for line in lines(folder) if "loss" in line}


def killed_at(step, run):
    """``run`` in a child process that is killed with signal 9 before ``step``; how the child ended."""
    from transformers import Trainer

    child = os.fork()
    if not child:
        original = Trainer.training_step

        def dies(self, *args, **kwargs):
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)

        Trainer.training_step = dies
        try:
            run()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_two_processes(run):
    """``run`` in two processes that share the work; how they ended."""
    from accelerate.state import AcceleratorState, PartialState

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            AcceleratorState._reset_state(True)
            PartialState._reset_state()
            code = 1
            try:
                run()
                code = 0
            finally:
                traceback.print_exc()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@torch.no_grad()
def logprobs(model, asked, said):
    """Sum of the log-probabilities of the tokens ``said`` after ``asked``, written out."""
    model.eval()
    ids = torch.tensor([asked + said])
    each = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(float(each[len(asked) - 1 + i, token]) for i, token in enumerate(said))
