"""``make quickstart``: SmolLM2-135M-Instruct learns a small task in a few minutes on a CPU, and shows that it did.

    python -m veneer.train.quickstart [CONFIG] [--KEY VALUE]...

This is ``veneer train examples/quickstart/config.yaml`` with two things around it: the model is fetched first, and the
adapter is read back from its folder at the end and examined on the held-out rows.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from veneer.train import adapters, config, models, recipes, report
from veneer.train.prepare import Prepared, counts, prepare
from veneer.train.pretrained import FetchError, fetch_smollm2
from veneer.train.tokens import IGNORED

CONFIG = "examples/quickstart/config.yaml"


@dataclass
class Score:
    """How a model does on the held-out rows."""

    rows: int
    exact: int
    """Rows that it would answer with the wanted word and nothing else."""
    chosen: int
    """Rows where, of the words that are answers in this task, the wanted one is the likeliest to come first."""


def main(words: list[str]) -> int:
    """Fetch, train, examine, show. Returns the exit code."""
    console = Console(file=sys.stdout, highlight=False)
    path = words.pop(0) if words and not words[0].startswith("--") else CONFIG
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no '{path}' here; run the quickstart from the root of a clone of veneer.")
    if not any(word.split("=")[0] in ("--model", "--model.path") for word in words):
        words = ["--model", str(fetch_smollm2(say=lambda line: console.print(line, soft_wrap=True))), *words]
    models.quiet()
    prepared = prepare(config.load(path, [], words, adapters.problems))
    _open(console, prepared)
    outcome = recipes.run(prepared, console)
    console.print()
    report.show_outcome(console, outcome)
    if outcome.stopped_at:
        return 130
    before, after = examine(prepared, outcome.folder)
    console.print()
    _show(console, before, after)
    return 0


def _open(console: Console, prepared: Prepared) -> None:
    """What is about to happen, before the minutes in which it does."""
    settings = prepared.config
    shape = prepared.task.skeleton(prepared, torch.float32)
    adapted = adapters.attach(shape, copy.deepcopy(prepared.adapter))  # planting settles choices in it
    trainable, total = counts(adapted)
    report.facts(
        console,
        [
            ("model", f"{settings.model.path}"),
            ("task", f"{settings.data.system} Answered in one word."),
            ("data", f"{len(prepared.train)} rows to train on, {len(prepared.held)} held out"),
            ("adapter", f"LoRA: {trainable:,} trainable of {total:,} parameters ({100 * trainable / total:.2f} %)"),
            ("run", f"{prepared.schedule.steps} steps of {settings.train.batch_size} rows"),
        ],
    )
    console.print("\nThe untouched model reads and answers the held-out prompts first.")


def examine(prepared: Prepared, folder: str) -> tuple[Score, Score]:
    """The scores of the base and of the adapter as it stands in its folder, on the held-out rows."""
    model: Any = adapters.load(models.load_model(prepared.config.model), folder).eval()
    with model.disable_adapter():
        before = score(model, prepared)
    return before, score(model, prepared)


@torch.inference_mode()
def score(model: nn.Module, prepared: Prepared) -> Score:
    """One pass over the held-out rows.

    The likeliest token at every learnt place, given the wanted tokens before it, is the wanted one exactly when greedy
    generation writes the whole answer: so no text need be generated.
    """
    held, batch_size = prepared.held.rows, prepared.config.eval.batch_size or prepared.config.train.batch_size
    answers = torch.tensor(sorted({_learnt(row)[0] for row in held}))  # (words,), their first tokens
    device = next(model.parameters()).device
    result = Score(len(held), 0, 0)
    for start in range(0, len(held), batch_size):
        batch = prepared.collate(held[start : start + batch_size])
        inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].cpu()  # (batch, length - 1, vocabulary)
        labels = batch["labels"][:, 1:]
        learnt = labels != IGNORED
        result.exact += int(((logits.argmax(-1) == labels) | ~learnt).all(1).sum())
        row, first = torch.arange(len(labels)), learnt.int().argmax(1)
        choice = answers[logits[row, first][:, answers].argmax(1)]
        result.chosen += int((choice == labels[row, first]).sum())
    return result


def _learnt(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def _show(console: Console, before: Score, after: Score) -> None:
    console.print(f"The {after.rows} held-out rows again, with the adapter as it stands in its folder:")
    exact = f"{_share(before.exact, before)} before, {_share(after.exact, after)} after"
    chosen = f"{_share(before.chosen, before)} before, {_share(after.chosen, after)} after"
    report.facts(
        console,
        [
            ("right answer", f"{exact}; the wanted word and nothing else"),
            ("right leaning", f"{chosen}; the wanted word likelier than the other"),
        ],
    )


def _share(count: int, of: Score) -> str:
    return f"{count} ({100 * count / of.rows:.0f} %)"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, FetchError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
