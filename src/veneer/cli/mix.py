"""``veneer mix``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli import run

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] --adapters FOLDER... [--KEY VALUE]...",
        help="The adapters: folders, a folder full of them, or name=folder. Then settings as for `veneer train`; "
        "--adapter.KEY sets an option of the method.",
        show_default=False,
    ),
]


def mix(
    words: Words = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="mole or xlora: gates that train; arrow: no training; lorahub: a search; or a rule that makes one "
            "LoRA of them: cat, linear, svd, ties, dare_ties, ...",
        ),
    ] = "mole",
    sets: run.Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output folder holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Make one model of several trained LoRAs, training only what weighs them.

    veneer mix --adapters french law maths --method mole --data rows.jsonl --out mixture

    Leaves what `veneer train` leaves, for `veneer chat --adapter` and PeftModel.from_pretrained. Without --data the
    methods that need no training just combine and save.
    """
    given, rest = _adapters(list(words or []))
    if not given:
        raise ValueError("Say which adapters to mix: --adapters FOLDER FOLDER ...")
    from veneer.train import mixing, models

    mixing.check(method)
    models.quiet()
    named = mixing.experts(given)
    own = [f"{key}={value}" for key, value in mixing.defaults(named).items() if not _says(rest, sets, key)]
    if not _says(rest, sets, "output.dir"):
        own.append(f"output.dir=runs/mix-{method}")
    if method in mixing.TRAINED:
        sets = [f"adapter={mixing.block(method, named)}", *own, *(sets or [])]
        run.train(rest, sets, resume, overwrite, dry_run)
    elif resume or dry_run:
        raise ValueError(f"{method} trains nothing, so there is nothing to {'resume' if resume else 'plan'}.")
    else:
        _combine(method, named, rest, [*own, *(sets or [])], overwrite)


def _combine(method: str, named: dict[str, str], rest: list[str], sets: list[str], overwrite: bool) -> None:
    from rich.console import Console

    from veneer.train import config, mixing, report

    options, rest = mixing.split(rest)
    mixing.check_options(method, options)
    has_rows = _says(rest, sets, "data.train")
    path = rest.pop(0) if rest and not rest[0].startswith("--") else None
    if overwrite:
        rest.append("--output.overwrite")
    console = Console(file=sys.stdout, highlight=False)
    if not has_rows:  # which a run needs: what needs none is checked as if it had some
        settings = config.load(path, [*sets, "data.train=none"], rest)
        out = settings.output
        if Path(out.dir, "adapter_config.json").exists() and not out.overwrite:
            raise ValueError(f"'{out.dir}' holds an adapter already; replace it by --overwrite, or name another --out.")
        mixing.without_data(settings.model, out.dir, method, named, options)
        console.print(f"{len(named)} adapters, {method}: {out.dir}", soft_wrap=True)
        console.print(f"Talk to it:  veneer chat --adapter {out.dir}", soft_wrap=True)
        return
    settings = config.load(path, sets, rest)
    report.show_outcome(console, mixing.with_data(settings, method, named, options, console))


def _adapters(words: list[str]) -> tuple[list[str], list[str]]:
    """(what follows --adapters, the other words)."""
    given: list[str] = []
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if word != "--adapters" and not word.startswith("--adapters="):
            rest.append(word)
            continue
        if "=" in word:
            given.append(word.partition("=")[2])
        while words and not words[0].startswith("--"):
            given.append(words.pop(0))
    return given, rest


SAID = {
    "model.path": ("model",),
    "output.dir": ("output", "out", "output_dir"),
    "data.train": ("data",),
    "data.system": ("system",),
    "data.template": ("template",),
}
"""Setting -> what else it is called on the command line and, where it stands for a section, in a file."""


def _says(rest: list[str], sets: list[str] | None, key: str) -> bool:
    """Whether the settings file or the command line gives this setting."""
    flags = {word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    flags |= {item.partition("=")[0].strip() for item in sets or ()}
    if flags & {key, *SAID[key]}:
        return True
    if not rest or rest[0].startswith("--"):
        return False
    from veneer.train import document

    section, _, leaf = key.partition(".")
    value = document.read(rest[0]).values.get(section)
    return leaf in value if isinstance(value, dict) else value is not None and section in SAID[key]
