"""``veneer compare``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from veneer.cli.run import Json, Sets, Words


def compare(
    words: Words = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Names, names with settings (lora:r=8), or adapter configs, by commas.")
    ] = "lora,dora,ia3",
    budget: Annotated[
        str, typer.Option("--budget", help="What is equal: steps, steps=200, params=500000, params=1%, time=300.")
    ] = "steps",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each method.")] = 3,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Train several methods at equal budget on your data: which is best, and how sure is that.

    Run again, it goes on where it stopped: finished runs are not run again.
    """
    from veneer.train import config

    rest = list(words or [])
    path = rest.pop(0) if rest and not rest[0].startswith("--") else None
    if path is None and not rest and not sets:
        raise ValueError("Name a settings file, or give --model, --data and --out.")
    config.load(path, sets or [], rest)  # cheap errors first, before the imports that take seconds

    from veneer.train import adapters, models
    from veneer.train import compare as comparing

    models.quiet()
    equal = comparing.Budget.parse(budget)
    settings = config.load(path, sets or [], rest, adapters.problems)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    say = (lambda line: None) if json else (lambda line: print(line, file=sys.stderr, flush=True))
    result = comparing.compare(settings, names, equal, seeds, say)
    if json:
        import dataclasses
        import json as writer

        print(writer.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False))
        return
    show(result)


def show(result: Any) -> None:
    """A table of the methods, the recommendation, and where the picture is."""
    from statistics import fmean

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for notice in result.notices:
        console.print(Text.assemble(("note  ", "yellow"), notice))
    table = Table(
        "method", f"{result.score}, 95 %", "trainable", "steps", "seconds", "memory",
        box=None, padding=(0, 2), header_style="bright_black",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for one in result.contenders:
        if not one.scores:
            table.add_row(Text(one.name, "bold"), Text("failed", "red"), f"{one.trainable:,}", f"{one.steps:,}")
            console.print(Text.assemble(("failed  ", "red"), f"{one.name}: {one.failed}"))
            continue
        half = one.interval
        table.add_row(
            Text(one.name, "bold"),
            f"{one.mean:.4f} ± {half:.4f}" if half is not None else f"{one.mean:.4f}",
            f"{one.trainable:,}",
            f"{one.steps:,}",
            f"{fmean(one.seconds):,.0f}",
            f"{max(one.memory) / 1e9:.2f} GB",
        )
    console.print(
        f"Equal: {result.budget}. {len(result.seeds)} seeds. "
        f"{result.score.capitalize()} on held-out rows; the base's is {result.before:.4f}."
    )
    console.print(table)
    console.print(Text(result.sentence, "bold"))
    console.print(Text("  ".join(result.files), "bright_black"))
