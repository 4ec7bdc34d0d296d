"""``veneer generate`` and ``veneer chat``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str | None, typer.Option("--model", "-m", help="The base model; default: the one the adapter names.")]
Adapter = Annotated[str | None, typer.Option("--adapter", "-a", help="An adapter's folder.")]
System = Annotated[str | None, typer.Option("--system", help="A system message.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of an answer at most.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0: the likeliest token each time.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens of this share.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, or auto.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts; `-` reads one from stdin.")] = None,
    model: Model = None,
    adapter: Adapter = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Prompts: one a line (.txt), or rows with prompt, instruction or messages."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write rows with their answers to this .jsonl file.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without a chat template.")
    ] = False,
    system: System = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Write the answer as it comes.")] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer prompts, with an adapter or without.

    A classifier answers with the class, a tagger with what is named in the text, an embedding model with the vector.
    """
    rows = _rows(prompt or [], file)
    session = _session(model, adapter, device, dtype, seed, trust_remote_code)
    if not session.writes:
        _respond(session, rows, out)
        return
    template = "none" if raw else None
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    sink = out.open("w", encoding="utf-8") if out else None
    try:
        for number, row in enumerate(rows, 1):
            messages = _messages(row, system)
            if len(rows) > 1 and not sink:
                print(f"\n> {messages[-1]['content']}")
            if stream and not sink:
                for piece in session.stream(messages, template, **options):
                    print(piece, end="", flush=True)
                print()
                continue
            text = session.answer(messages, template, **options)
            if sink:
                sink.write(json.dumps({**row, "answer": text}, ensure_ascii=False) + "\n")
                sink.flush()
                print(f"\r{number}/{len(rows)}", end="", file=sys.stderr, flush=True)
            else:
                print(text)
    finally:
        if sink:
            sink.close()
            print(file=sys.stderr)


def _respond(session: Any, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Answers of a task that does not write text, 64 rows at a time."""
    sink = out.open("w", encoding="utf-8") if out else None
    try:
        for start in range(0, len(rows), 64):
            some = rows[start : start + 64]
            for row, said in zip(some, session.respond([{**row, "text": _text(row)} for row in some]), strict=True):
                if sink:
                    sink.write(json.dumps({**row, **said}, ensure_ascii=False) + "\n")
                elif isinstance(said["answer"], str):
                    print(said["answer"], *(f"{value:.3f}" for value in said.values() if isinstance(value, float)))
                else:
                    print(json.dumps(said["answer"]))
    finally:
        if sink:
            sink.close()


def chat(
    model: Model = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="An adapter's folder; may be repeated.")
    ] = None,
    system: System = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a model; /base switches the adapter off and on, /help lists what else."""
    folders = list(adapter or [])
    session = _session(model, folders[0] if folders else None, device, dtype, seed, trust_remote_code)
    if not session.writes:
        task = session.recipe["task"]
        raise ValueError(f"'{folders[0]}' was trained for {task} and cannot chat; ask it with `veneer generate`.")
    from veneer.train.conversation import Conversation

    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talk = Conversation(session, folders, system, options)
    print(talk.greeting())
    while not talk.over:
        try:
            line = input("\n> ")
        except EOFError:
            print()
            return
        try:
            for piece in talk.say(line):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            print(" [stopped]", end="")
        print()


def _session(
    model: str | None, adapter: str | None, device: str, dtype: str, seed: int | None, trust_remote_code: bool
) -> Any:
    from veneer.train import models
    from veneer.train.evaluate import Session

    models.quiet()
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    return Session(model, adapter, {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code})


def _rows(prompts: list[str], file: Path | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"prompt": sys.stdin.read() if text == "-" else text} for text in prompts]
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file '{file}' with prompts.")
        if file.suffix == ".txt":
            rows += [{"prompt": line} for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            from veneer.train import rows as reader

            for number, row in enumerate(reader.read(file), 1):
                if isinstance(row, Exception):
                    raise ValueError(f"{file.name} row {number}: {row}.")
                rows.append(row)
    if not rows:
        raise ValueError("There is nothing to answer: give a prompt, `-` for stdin, or --file.")
    return rows


def _messages(row: dict[str, Any], system: str | None) -> list[dict[str, Any]]:
    """A row of any known format as the conversation up to the answer that is wanted."""
    if "messages" in row:
        messages = [dict(turn) for turn in row["messages"]]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
    else:
        messages = [{"role": "user", "content": _text(row)}]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _text(row: dict[str, Any]) -> str:
    if isinstance(row.get("tokens"), list):
        return " ".join(map(str, row["tokens"]))
    text = row.get("prompt") or row.get("instruction") or row.get("text") or row.get("anchor")
    if not isinstance(text, str):
        raise ValueError(f"A row needs prompt, instruction, text or messages, and has {', '.join(map(str, row))}.")
    extra = row.get("input") if "instruction" in row else None
    return f"{text}\n\n{extra}" if extra else text
