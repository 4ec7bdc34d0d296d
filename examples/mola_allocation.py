"""MoLA's question on a small model: is it better to have more experts in the deeper layers, or in the first ones?

    python examples/mola_allocation.py MODEL [--seeds 0 1 2] [--r 4] [--steps 24]

Trains SmolLM2 (a folder or hub id) on the quickstart's reviews, with experts spread over the depth as 2-4-6-8, 8-6-4-2
and 5-5-5-5, and prints the loss on held-out rows. The 30 layers fall into groups of 8, 7, 7 and 8, so that each way has
150 experts at every kind of layer, and so the same number of parameters. Run it from the root of a clone.
"""

from __future__ import annotations

import argparse
import io
import statistics

from rich.console import Console

from veneer.train import adapters, config, models, recipes
from veneer.train.prepare import prepare
from veneer.train.quickstart import CONFIG

ALLOCATIONS = ("2468", "8642", "5555")


def spread(counts: str, layers: int) -> list[int]:
    """The experts of each layer: four groups, the outer two larger by one where the layers leave a rest of two."""
    size, rest = divmod(layers, 4)
    sizes = [size + (rest > 1), size + (rest % 2), size, size + (rest > 1)]
    return [int(count) for count, times in zip(counts, sizes, strict=True) for _ in range(times)]


def train(model: str, counts: str, given: argparse.Namespace, seed: int) -> tuple[int, float, float]:
    """One run: its trainable parameters, and the held-out loss before and after."""
    layers = models.load_config(config.Model(path=model)).num_hidden_layers
    words = ["--model", model, "--adapter.method", "mola", "--adapter.r", str(given.r)]
    words += ["--adapter.lora_alpha", str(2 * given.r), "--adapter.experts", str(spread(counts, layers))]
    words += ["--adapter.target_modules", "[q_proj,v_proj]", "--train.steps", str(given.steps)]
    words += ["--output.dir", f"{given.out}/mola-{counts}-{seed}", "--train.seed", str(seed), "--eval.prompts", "0"]
    words += ["--eval.every", str(given.steps), "--train.batch_size", str(given.batch_size)]
    prepared = prepare(config.load(CONFIG, [], words, adapters.problems))
    outcome = recipes.run(prepared, Console(file=io.StringIO()))
    return outcome.trainable, outcome.loss_before or 0.0, outcome.loss_after or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--r", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", default="runs")
    given = parser.parse_args()
    models.quiet()
    found: dict[str, list[float]] = {counts: [] for counts in ALLOCATIONS}
    print("| experts | seed | trainable | held-out loss |\n|---|---|---|---|")
    for seed in given.seeds:
        for counts in ALLOCATIONS:
            trainable, before, after = train(given.model, counts, given, seed)
            found[counts].append(after)
            print(f"| {counts} | {seed} | {trainable:,} | {before:.3f} -> {after:.4f} |", flush=True)
    for counts, losses in found.items():
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{counts}: mean {statistics.fmean(losses):.4f}, standard deviation {deviation:.4f}")


if __name__ == "__main__":
    main()
