"""``veneer train`` and ``veneer plan``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [--KEY VALUE]...",
        help="A YAML, JSON or TOML file, and settings over it: --epochs 1, --train.learning-rate 1e-4, --model PATH.",
        show_default=False,
    ),
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set one key; may be repeated.")]
Probe = Annotated[bool, typer.Option("--probe", help="Load the model and take a real step, for time and true memory.")]
Json = Annotated[bool, typer.Option("--json", help="The plan as JSON.")]


def train(
    words: Words = None,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and stop; the same as `veneer plan`.")
    ] = False,
    probe: Probe = False,
) -> None:
    """Fine-tune a model on your data.

    Leaves an adapter with its tokenizer, run.yaml and metrics.jsonl in the output folder, and shows held-out loss and
    answers before and after. Ctrl-C keeps the last checkpoint; --resume goes on from it.
    """
    if dry_run:
        plan(words, sets, probe)
        return
    settings = _settings(words, sets, overwrite)  # cheap errors first, before the imports that take seconds
    from veneer.train import launch

    if launch.wanted(settings):
        flags = [*(["--resume"] if resume else []), *(["--overwrite"] if overwrite else [])]
        launch.run(settings, ["train", *(words or []), *(w for one in sets or [] for w in ("--set", one)), *flags])
        return
    prepared, console = _prepare(words, sets, overwrite)
    _run(prepared, console, resume)


def plan(words: Words = None, sets: Sets = None, probe: Probe = False, json: Json = False) -> None:
    """Show what `veneer train` would do: parameters, tokens with their loss mask, steps, memory, time."""
    prepared, console = _prepare(words, sets, False)
    fits = _plan(prepared, console, probe, json)
    if not json:
        from veneer.train import distributed

        for line in distributed.plan_lines(prepared.config, words or []):
            console.print(line)
    if not fits:
        raise SystemExit(1)


def report(folder: Annotated[str, typer.Argument(help="A run's output folder.")]) -> None:
    """Write report.html from what a run has left so far, finished or not."""
    from veneer.train import html

    print(html.write(folder))


def _settings(words: list[str] | None, sets: list[str] | None, overwrite: bool, check_adapter: Any = None) -> Any:
    from veneer.train import config

    rest = list(words or [])
    path = rest.pop(0) if rest and not rest[0].startswith("--") else None
    if path is None and not rest and not sets:
        raise ValueError("Name a settings file, or give --model, --data and --out.")
    if overwrite:
        rest.append("--output.overwrite")
    return config.load(path, sets or [], rest, check_adapter)


def _prepare(words: list[str] | None, sets: list[str] | None, overwrite: bool) -> tuple[Any, Any]:
    _settings(words, sets, overwrite)  # cheap errors first, before the imports that take seconds

    from rich.console import Console

    from veneer.train import adapters, distributed, models
    from veneer.train.prepare import prepare

    models.quiet()
    settings = _settings(words, sets, overwrite, adapters.problems)
    return prepare(settings), Console(file=sys.stdout, highlight=False, quiet=not distributed.is_main())


def _run(prepared: Any, console: Any, resume: bool) -> None:
    from veneer.train import recipes, report

    report.show_notices(console, prepared.notices)
    outcome = recipes.run(prepared, console, resume)
    report.show_outcome(console, outcome)
    if outcome.stopped_at:
        raise SystemExit(130)


def _plan(prepared: Any, console: Any, probe: bool = False, json: bool = False) -> bool:
    from veneer.train import plan as planning
    from veneer.train import report

    made = planning.make(prepared, probe)
    if json:
        print(made.to_json())
    else:
        report.show_plan(console, made)
    return made.memory.fits


def execute(sets: dict[str, str], notices: list[str], resume: bool) -> None:
    """Train with settings that were translated from elsewhere."""
    prepared, console = _prepare(None, [f"{key}={value}" for key, value in sets.items()], False)
    prepared.notices[:0] = notices
    _run(prepared, console, resume)


def show_plan(words: list[str], notices: list[str]) -> bool:
    """Show the plan for words of the command line; whether it fits into memory."""
    prepared, console = _prepare(words, None, False)
    prepared.notices[:0] = notices
    return _plan(prepared, console)
