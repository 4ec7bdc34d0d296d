"""MoLA's question on a small model: is it better to have more experts in the deeper layers, or in the first ones?

    python examples/mola_allocation.py MODEL [--seeds 0 1] [--r 4]

Trains SmolLM2 (a folder or hub id) on the quickstart's reviews with the same number of experts in all, spread over the
depth as 2-4-6-8, 8-6-4-2 and 5-5-5-5, and prints the loss on the held-out rows and how many it would answer right.
Run it from the root of a clone.
"""

from __future__ import annotations

import argparse
import io

from rich.console import Console

from veneer.train import adapters, config, models, recipes
from veneer.train.prepare import prepare
from veneer.train.quickstart import CONFIG, examine

ALLOCATIONS = ("2468", "8642", "5555")


def train(model: str, experts: str, r: int, seed: int) -> str:
    """One run; returns its line of the table."""
    words = ["--model", model, "--adapter.method", "mola", "--adapter.r", str(r), "--adapter.lora_alpha", str(2 * r)]
    words += ["--adapter.experts", f"'{experts}'", "--adapter.target_modules", "[q_proj,v_proj]"]
    words += ["--output.dir", f"runs/mola-{experts}-{seed}", "--train.seed", str(seed), "--eval.prompts", "0"]
    prepared = prepare(config.load(CONFIG, [], words, adapters.problems))
    outcome = recipes.run(prepared, Console(file=io.StringIO()))
    _, after = examine(prepared, outcome.folder)
    loss = f"{outcome.loss_before:.3f} -> {outcome.loss_after:.3f}"
    return f"| {experts} | {seed} | {outcome.trainable:,} | {loss} | {after.exact} | {after.chosen} of {after.rows} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--r", type=int, default=4)
    given = parser.parse_args()
    models.quiet()
    print("| experts | seed | trainable | held-out loss | exact answers | right leaning |\n|---|---|---|---|---|---|")
    for seed in given.seeds:
        for experts in ALLOCATIONS:
            print(train(given.model, experts, given.r, seed), flush=True)


if __name__ == "__main__":
    main()
