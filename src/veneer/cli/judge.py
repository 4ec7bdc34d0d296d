"""``veneer judge``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def judge(
    files: Annotated[
        list[Path],
        typer.Argument(help="Rows with prompt and answers; or several files of `veneer generate --out`, one a model."),
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The judge: a folder or a hub id.")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="An adapter's folder, on the judge.")] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="A server's chat completions, up to /v1; --model is its name there.")
    ] = None,
    criteria: Annotated[str | None, typer.Option("--criteria", "-c", help="What to look at, in a sentence.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write preference pairs to this .jsonl file, for task: dpo.")
    ] = None,
) -> None:
    """Have a model compare answers; each pair is asked in both orders, and only consistent verdicts count."""
    rows = _rows(files)

    from veneer.train import judge as judging
    from veneer.train import models

    models.quiet()
    judge = judging.make(model, adapter, url, criteria or judging.CRITERIA)

    def say(done: int) -> None:
        print(f"\r{done}/{len(rows)}", end="", file=sys.stderr, flush=True)

    pairs, tally = judging.label(judge, rows, say)
    print(file=sys.stderr)
    if out:
        out.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
        after = f". Next:  veneer init --model MODEL --data {out}" if pairs else ": there is no verdict that counts."
        print(f"Wrote {len(pairs)} pairs to {out}{after}")
    turned = 100 * tally.inconsistent / max(1, tally.asked)
    print(f"{tally.inconsistent} of {tally.asked} verdicts ({turned:.0f} %) changed with the order; they do not count.")
    if turned > 50:
        print("A judge that goes by the order more than by the answers is no judge: take a larger model.")
    if tally.alike:
        print(f"{tally.alike} pairs were alike and were not asked about.")
    decided = sum(tally.wins)
    if len(tally.wins) == 2 and decided:
        share, low, high = tally.share()
        name = files[1].name if len(files) == 2 else "The second answer"
        print(f"{name} won {tally.wins[1]} of {decided}: {share:.0%} ({low:.0%} to {high:.0%}).")


def _rows(files: list[Path]) -> list[dict[str, Any]]:
    """{prompt, answers} of each row; of several files, the answers to one prompt together."""
    from veneer.train import rows

    joined: dict[str, list[str]] = {}
    single = len(files) == 1
    found = []
    for path, _ in rows.expand([str(file) for file in files]):
        for number, row in enumerate(rows.read(path), 1):
            where = f"{path.name} row {number}"
            if isinstance(row, Exception) or not isinstance(row, dict):
                raise ValueError(f"{where}: {row if isinstance(row, Exception) else 'a row must be an object'}")
            prompt = row.get("prompt") or row.get("instruction") or row.get("messages")
            if isinstance(prompt, list):
                prompt = "\n".join(str(turn.get("content", "")) for turn in prompt)
            if not isinstance(prompt, str):
                raise ValueError(f"{where} needs 'prompt', a text.")
            if single:
                answers = row.get("answers")
                if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(a, str) for a in answers):
                    raise ValueError(f"{where} needs 'answers', a list of two or more texts; or name a second file.")
                found.append({"prompt": prompt, "answers": answers})
            elif not isinstance(row.get("answer"), str):
                raise ValueError(f"{where} needs 'answer', a text, as `veneer generate --out` writes it.")
            else:
                joined.setdefault(prompt, []).append(row["answer"])
    if single:
        return found
    whole = [{"prompt": prompt, "answers": said} for prompt, said in joined.items() if len(said) == len(files)]
    if not whole:
        raise ValueError("The files have no prompt in common.")
    return whole
