"""``veneer init`` and ``veneer data check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(help="Look over data before training on it.", no_args_is_help=True)


def init(
    model: Annotated[str | None, typer.Option("--model", "-m", help="The base model: a folder or a hub id.")] = None,
    files: Annotated[list[str] | None, typer.Option("--data", "-d", help="Training data; may be repeated.")] = None,
    to: Annotated[Path, typer.Option("--to", help="The settings file to write.")] = Path("run.yaml"),
    out: Annotated[str, typer.Option("--out", help="The output folder named in it.")] = "out",
    schema: Annotated[bool, typer.Option("--schema", help="Print the settings' JSON schema, for editors.")] = False,
) -> None:
    """Write a commented settings file for a model and a data file."""
    if schema:
        import json

        from veneer.train.config import RunConfig

        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    if not model or not files:
        raise ValueError("Give --model and --data, so that the file can be written for them.")
    if to.exists():
        raise ValueError(f"'{to}' exists already; name another file with --to.")
    from veneer.train import starter

    to.write_text(starter.write(model, files, out, str(to)), encoding="utf-8")
    print(f"Wrote {to}. Next:  veneer plan {to}")


@data.command()
def check(
    files: Annotated[list[str], typer.Argument(help="Data files, folders, globs.")],
    held: Annotated[list[str] | None, typer.Option("--eval", help="Held-out data, to look for leaks.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose tokenizer and template the rows will meet.")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Rows longer than this are named.")] = 1024,
    format: Annotated[
        str, typer.Option("--format", help="messages, alpaca, text, labels, tags, pairs, preference, ..., or auto.")
    ] = "auto",
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="OURS=YOURS", help="A column's name; may be repeated.")
    ] = None,
) -> None:
    """Say what is in data, what is wrong with it and in which rows. Exit code 1 if rows cannot be used."""
    tokenizer = None
    if model:
        from veneer.train import models
        from veneer.train.config import Model

        models.quiet()
        tokenizer = models.load_tokenizer(Model.model_validate({"path": model}))
    from rich.console import Console

    from veneer.train import doctor

    columns = dict(_pair(text) for text in column or [])
    found = doctor.check(list(files), held, format=format, columns=columns, tokenizer=tokenizer, max_length=max_length)
    console = Console(highlight=False)
    for name, value in found.facts:
        console.print(f"[bold]{name:<8}[/]", end="")
        console.print(value, markup=False, soft_wrap=True)
    for finding in found.findings:
        console.print("note    ", style="yellow", end="")
        console.print(str(finding), markup=False, soft_wrap=True)
    if not found.findings:
        console.print("Nothing is wrong with it.")
    if any(finding.what == "rows cannot be used" for finding in found.findings):
        raise SystemExit(1)


def _pair(text: str) -> tuple[str, str]:
    ours, equals, yours = text.partition("=")
    if not equals:
        raise ValueError(f"--column needs the form ours=yours, such as label=topic, and '{text}' has no '='.")
    return ours, yours
