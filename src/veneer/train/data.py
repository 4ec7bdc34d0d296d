"""Examples: files of several formats, read row by row into one form."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from veneer.train import preference_rows, rows
from veneer.train.formats import ANSWERED, FORMATS, brief, detect
from veneer.train.rows import Row, RowError


@dataclass
class Example:
    """One row: a conversation, or a prompt with its completion, or a text."""

    where: str
    messages: list[Row] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: list[Any] | None = None
    extra: Row = field(default_factory=dict)
    """What the row says besides: its label, tags, chosen and rejected answers, whatever a reward function reads."""

    @property
    def question(self) -> str:
        """What the model would be asked: the key under which repeated prompts are held out together."""
        if self.messages is not None:
            return next((str(m["content"]) for m in self.messages if m["role"] == "user"), "")
        return self.prompt if self.prompt is not None else self.text or ""


@dataclass
class Examples:
    """What was read, and what was found on the way."""

    rows: list[Example] = field(default_factory=list)
    format: str = ""
    files: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)


def load(
    files: list[str],
    format: str = "auto",
    columns: dict[str, str] | None = None,
    bad: str = "error",
    among: Iterable[str] = FORMATS,
) -> Examples:
    """Read files into examples.

    Args:
        files: paths or globs; ``path#500`` takes the first 500 rows.
        format: a key of ``FORMATS``, or ``auto`` to tell by the columns of the first row.
        columns: our column name -> the file's.
        bad: ``error`` refuses unusable rows, ``skip`` leaves them out and counts them.
        among: the formats that ``auto`` chooses from.

    Raises:
        ValueError: unusable rows (all are counted, the first five named), unknown columns, no rows.
        FileNotFoundError: a path or glob that matches nothing.
    """
    among = tuple(among)
    if format not in ("auto", *among):
        raise ValueError(f"data.format '{format}' does not serve here; it may be {', '.join(among)}, or auto.")
    result, errors = Examples(), []
    for path, limit in rows.expand(files):
        result.files.append(str(path))
        for number, raw in enumerate(rows.read(path), 1):
            if limit is not None and number > limit:
                break
            where = f"{path.name} row {number}"
            try:
                if isinstance(raw, Exception):
                    raise RowError(str(raw))
                row = _rename(raw, columns or {}, where)
                if "kto" in among and format in ("auto", "kto"):
                    row = preference_rows.apart(row)
                kind = format if format != "auto" else detect(row, where, among)
                result.format = result.format or kind
                if not {kind, result.format} <= {*ANSWERED, "text"}:  # only these may be mixed
                    kind = result.format
                _require(row, kind, where)
                result.rows.append(Example(where=where, **FORMATS[kind].convert(row)))
            except (RowError, json.JSONDecodeError) as error:
                errors.append(f"{where}: {error}")
    if errors and (bad == "error" or not result.rows):
        more = f"\n  and {len(errors) - 5} more" if len(errors) > 5 else ""
        count = "1 row cannot" if len(errors) == 1 else f"{len(errors)} rows cannot"
        raise ValueError(
            f"{count} be used:\n  " + "\n  ".join(errors[:5]) + more + "\nMend them, or set data.bad_rows: skip."
        )
    if not result.rows:
        raise ValueError(f"There are no rows in {', '.join(files)}.")
    result.skipped = errors
    return result


def continues(examples: list[Example]) -> bool:
    """Whether prompts and completions are one text cut in two: the space between them is mostly written down."""
    pairs = [(e.prompt, e.completion) for e in examples if e.prompt and e.completion]
    joined = sum(prompt[-1].isspace() or completion[0].isspace() for prompt, completion in pairs)
    return 2 * joined > len(pairs)


def split(examples: list[Example], holdout: str | float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows). Rows with the same prompt stay on one side, so nothing leaks across.

    ``auto`` holds out 5 %, at most 200 rows, and nothing from fewer than 20 rows.

    Raises:
        ValueError: ``holdout`` would leave nothing to train on.
    """
    if holdout == "auto":
        wanted = min(200, max(2, round(0.05 * len(examples)))) if len(examples) >= 20 else 0
    else:
        wanted = round(float(holdout) * len(examples)) if float(holdout) < 1 else int(float(holdout))
    if wanted == 0:
        return examples, []
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(examples):
        groups.setdefault(row.question, []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    for group in [group for group in order if len(group) <= wanted] or order:  # not far more than is wanted
        if len(held) >= wanted:
            break
        held.update(group)
    if len(held) >= len(examples) and holdout == "auto":
        return examples, []
    if len(held) >= len(examples):
        raise ValueError(f"data.holdout {holdout} would hold out all {len(examples)} rows and leave none to train on.")
    return [r for i, r in enumerate(examples) if i not in held], [r for i, r in enumerate(examples) if i in held]


def _require(row: Row, kind: str, where: str) -> None:
    missing = [key for key in FORMATS[kind].required if key not in row]
    if missing:
        near = [m for key in missing for m in difflib.get_close_matches(key, map(str, row), 1)]
        hint = f"; did you mean to map {missing[0]}: {near[0]}?" if near else ""
        raise RowError(f"format '{kind}' needs {', '.join(missing)}, and the row has {', '.join(map(str, row))}{hint}")


def _rename(row: Row, columns: dict[str, str], where: str) -> Row:
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object with columns, and is {brief(row)}")
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise RowError(f"data.columns names {', '.join(missing)}, and the row has {', '.join(map(str, row))}")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}} if columns else row
