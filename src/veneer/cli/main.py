"""The ``veneer`` command: its sub-commands, and errors in a sentence."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from veneer.cli import adapter, compare, configs, export, foreign, judge, mix, run, start, talk

app = typer.Typer(
    name="veneer",
    help="Parameter-efficient fine-tuning, from a model and a file of data to a tuned model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command()(start.init)
app.command(context_settings=PASS_ON)(run.train)
app.command(context_settings=PASS_ON)(run.plan)
app.command(context_settings=PASS_ON)(compare.compare)
app.command(context_settings=PASS_ON)(mix.mix)
app.command()(run.report)
app.command()(talk.generate)
app.command()(judge.judge)
app.command()(talk.chat)
app.command()(adapter.merge)
app.command()(export.export)
app.command()(adapter.inspect)
app.command()(adapter.methods)
app.command(context_settings=PASS_ON)(foreign.sft)
app.command("train-with-config")(foreign.train_with_config)
app.add_typer(start.data, name="data")
app.add_typer(configs.app, name="configs")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata  # 40 ms that only this needs

        try:
            version = metadata.version("veneer")
        except metadata.PackageNotFoundError:
            version = "from source"
        typer.echo(f"veneer {version}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what goes wrong is one red sentence and an exit code: 1, or 2 for wrong settings."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a shared machine down
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or bool(os.environ.get("VENEER_DEBUG"))
    words = [word for word in words if word != "--debug"]
    try:
        app(args=words, prog_name="veneer", standalone_mode=False)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own, about the command line itself
            error.show()
            sys.exit(error.exit_code)
        if type(error).__name__ == "Abort":
            sys.exit(130)
        if debug or not _expected(error):
            raise
        _say(str(error))
        sys.exit(2 if type(error).__name__ == "ConfigError" else 1)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _say("Stopped.")
        sys.exit(130)


def _expected(error: Exception) -> bool:
    """Errors that are about the user's files and settings, not about our code."""
    return (
        isinstance(error, ValueError | OSError | NotImplementedError | ImportError)
        or "OutOfMemory" in type(error).__name__
    )


def _say(text: str) -> None:
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{red}{text}{plain}", file=sys.stderr)


if __name__ == "__main__":
    main()
