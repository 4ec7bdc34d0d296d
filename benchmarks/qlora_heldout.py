"""Does a quantised base learn as well? Held-out loss of LoRA and of QLoRA, on the same rows, with several seeds each.

    python benchmarks/qlora_heldout.py MODEL [--data FOLDER] [--ways lora,nf4,bnb-nf4,qpissa,loftq] [--seeds 3]

Every run is ``veneer train`` as in the quickstart. ``--data`` is a folder of more such reviews, which the quickstart's
``make_data.py --rows 480 109`` writes: 80 held-out rows leave much to chance.
Only ``model.quantize`` and the seed differ, which fixes LoRA's start and the order of the rows; ``qpissa`` and
``loftq`` fit the start to our NF4 (``quantize_with_adapter``). What counts is the loss a run ends with, of its best
checkpoint; noise is the spread between the seeds of one way. A run that has finished is read from its folder and not
run again. Start it from the root of a clone.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from veneer import quantize_with_adapter
from veneer.train import adapters, config, models, recipes
from veneer.train.prepare import Prepared, build, prepare
from veneer.train.quickstart import CONFIG

QUANTIZE = {"lora": "none", "qpissa": "none", "loftq": "none"}
"""Way -> ``model.quantize``; the others are called as that setting calls them."""
STARTS = ("qpissa", "loftq")


def packed_along(start: str) -> Callable[[Prepared], Any]:
    """As ``prepare.build``, with the base put into NF4 along with the adapter's start."""

    def made(prepared: Prepared) -> Any:
        model = build(prepared)
        quantize_with_adapter(model, start)
        return model

    return made


def run(given: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
    """One run's report: ``loss_before``, ``loss_after``, ``best_step``, ``seconds``."""
    folder = Path(given.out) / f"{way}-{seed}"
    if not (folder / "report.json").is_file():
        words = ["--model", given.model, "--model.quantize", QUANTIZE.get(way, way), "--train.seed", str(seed)]
        words += ["--train.steps", str(given.steps), "--train.learning_rate", str(given.lr), "--eval.every"]
        words += [str(given.steps // 4), "--eval.prompts", "0"]
        if given.data:
            words += ["--data.train", f"{given.data}/train.jsonl", "--data.eval", f"{given.data}/heldout.jsonl"]
        words += ["--train.threads", "1", "--output.dir", str(folder)]
        prepared = prepare(config.load(CONFIG, [], words, adapters.problems))
        recipes.build = packed_along(way) if way in STARTS else build
        recipes.run(prepared, Console(file=io.StringIO()))
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    """A row a way: the loss of each seed, their mean, and their standard deviation."""
    print("\n| base | before | held-out loss of each seed | mean | standard deviation |\n|---|---|---|---|---|")
    for way, reports in found.items():
        losses = [report["loss_after"] for report in reports]
        spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {way} | {reports[0]['loss_before']:.3f} | {each} | {statistics.fmean(losses):.4f} | {spread} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="")
    parser.add_argument("--ways", default="lora,nf4,bnb-nf4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", default="runs/qlora_heldout")
    given = parser.parse_args()
    models.quiet()
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for way in given.ways.split(","):
            report = run(given, way, seed)
            found.setdefault(way, []).append(report)
            figures = f"{report['loss_before']:.4f} -> {report['loss_after']:.4f} (step {report['best_step']})"
            print(f"{way:8} seed {seed}: {figures}, {report['seconds']:.0f} s", flush=True)
    table(found)


if __name__ == "__main__":
    main()
