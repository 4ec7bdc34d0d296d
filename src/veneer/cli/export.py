"""``veneer export``."""

from __future__ import annotations

from typing import Annotated

import typer


def export(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="What to write; it must not exist.")],
    consumer: Annotated[str, typer.Option("--for", help="vllm, sglang, llama.cpp, ollama or peft.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The base; default: the one the adapter names.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", help="Of the LoRA that another method is turned into; 0.95 keeps that share of it."),
    ] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="Cut higher ranks down to this.")] = None,
    gguf: Annotated[str | None, typer.Option("--gguf", help="A GGUF file of the base.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Base and adapter in one GGUF, made from --gguf.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of a GGUF's new weights: f16, f32, bf16, q8_0.")] = "f16",
    serve_from: Annotated[str | None, typer.Option("--from", help="The base's name in Ollama.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
) -> None:
    """Write an adapter as a server reads it, with that server's rules checked.

    Methods that it does not read are turned into LoRA.
    """
    size = _rank(rank)
    from veneer.train import export as exporting
    from veneer.train import models

    models.quiet()
    options = exporting.Options(model, size, max_rank, gguf, merged, dtype, serve_from, trust_remote_code)
    done = exporting.export(adapter, out, consumer, options)
    for notice in done.notices:
        print(f"note  {notice}")
    print(f"Wrote {out} for {consumer}. Next:  {done.command}")


def _rank(text: str | None) -> int | float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 0 < value < 1:
        return value
    if value >= 1 and value == int(value):
        return int(value)
    raise ValueError(f"--rank is {text!r}: it must be a whole number, or a share between 0 and 1 such as 0.95.")
