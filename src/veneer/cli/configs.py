"""``veneer configs``: list, check and show config files, of runs and of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, check and show config files.", no_args_is_help=True)
Files = Annotated[list[Path], typer.Argument(help="Config files: adapter_config.json style, or of a run.")]


@app.command()
def ls(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("configs")) -> None:
    """List the configs in a folder, each with its method and main settings."""
    from veneer.cli.tables import show_configs
    from veneer.train import configs

    show_configs([configs.summary(path, folder) for path in configs.find(folder)])


@app.command()
def check(files: Files) -> None:
    """Check configs; every error with its line. Exit code 1 if there is one."""
    from veneer.train import configs

    wrong = 0
    for path in files:
        found = configs.errors(path)
        wrong += bool(found)
        print(f"{path}: ok" if not found else "\n".join(found))
    if wrong:
        raise SystemExit(1)


@app.command()
def show(file: Annotated[Path, typer.Argument(help="A config file.")]) -> None:
    """Show a config with all its defaults, as `veneer train` would see it."""
    from veneer.train import configs

    print(configs.whole(file), end="")
