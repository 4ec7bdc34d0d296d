"""``veneer sft`` and ``veneer train-with-config``: flags of PEFT's example and of a widely copied script around it."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any

import typer

Flags = Annotated[list[str] | None, typer.Argument(metavar="[--FLAG VALUE]...", help="The example's flags.")]


def sft(words: Flags = None) -> None:
    """Train with the flags of PEFT's examples/sft/train.py; each is mapped to a setting, or said to have no effect.

    A single .json or .yaml file of flags is accepted in place of the flags.
    """
    from veneer.train import document
    from veneer.train.foreign import translate

    rest = list(words or [])
    flags: dict[str, Any] = {}
    if rest and not rest[0].startswith("--"):
        flags = document.read(rest.pop(0)).values
    flags |= {key: value for key, value, _ in document.overrides([], rest)}
    if not flags:
        raise ValueError("Give the flags of the example, --model_name_or_path, --dataset_name, --output_dir, ...")
    done = translate(flags, flags.pop("adapter_config", None))
    from veneer.cli.run import execute

    execute(_sets(done), done.notices, done.resume)


def train_with_config(
    model_path: Annotated[str, typer.Option("--model_path", help="The base model: a folder or a hub id.")],
    dataset_name: Annotated[str, typer.Option("--dataset_name", help="A data file or folder, or a hub id.")],
    config: Annotated[str, typer.Option("--config", help="An adapter's JSON, as PEFT writes it.")],
    output_dir: Annotated[str, typer.Option("--output_dir", help="Where the adapter goes.")],
    num_epochs: Annotated[float, typer.Option("--num_epochs")] = 3,
    batch_size: Annotated[int, typer.Option("--batch_size")] = 4,
    learning_rate: Annotated[float, typer.Option("--learning_rate")] = 2e-4,
    max_length: Annotated[int, typer.Option("--max_length")] = 2048,
    use_4bit: Annotated[bool, typer.Option("--use_4bit")] = False,
    use_nested_quant: Annotated[bool, typer.Option("--use_nested_quant")] = False,
    push_to_hub: Annotated[bool, typer.Option("--push_to_hub")] = False,
    torch_dtype: Annotated[str, typer.Option("--torch_dtype")] = "auto",
    execute: Annotated[bool, typer.Option("--execute", help="Run the command, instead of only showing it.")] = False,
) -> None:
    """Show the plan of a run with an adapter's JSON, and the command for it; with --execute run that command."""
    import shlex

    from veneer.train.foreign import translate

    flags: dict[str, Any] = {
        "model_name_or_path": model_path,
        "dataset_name": dataset_name,
        "output_dir": output_dir,
        "num_train_epochs": num_epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "torch_dtype": torch_dtype,
    }
    flags |= {"use_4bit_quantization": True} if use_4bit else {}
    flags |= {"use_nested_quant": True} if use_nested_quant else {}
    flags |= {"push_to_hub": True} if push_to_hub else {}
    done = translate(flags, config)
    words = ["train", *(f"--{key}={value}" for key, value in _sets(done).items())]
    from veneer.cli.run import show_plan

    fits = show_plan(words[1:], done.notices)
    print(f"\nThe command:\n  veneer {shlex.join(words)}")
    if execute:
        raise SystemExit(subprocess.run([sys.executable, "-m", "veneer.cli", *words], check=False).returncode)
    print("\nRun it with --execute." if fits else "")


def _sets(done: Any) -> dict[str, str]:
    """Settings as text for the command line; lists and mappings in YAML's flow style."""
    import json

    return {
        key: json.dumps(value) if isinstance(value, list | dict | bool) else str(value)
        for key, value in done.sets.items()
    }
