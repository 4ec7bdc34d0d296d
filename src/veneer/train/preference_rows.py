"""Rows that compare answers, label them, or only ask: brought into one shape, and looked over.

A pair ends up as {prompt, chosen, rejected}, whichever way it was written: with the prompt in a column of its own, or
as two whole texts or conversations that begin alike. Each part is a text, or turns of a conversation.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from veneer.train.rows import Row, RowError

if TYPE_CHECKING:
    from veneer.train.data import Example

Said = str | list[Row]
"""A text, or turns of a conversation."""


def apart(row: Row) -> Row:
    """A conversation that is labelled good or bad, as prompt, completion and label; any other row as it is."""
    label, turns = row.get("label", row.get("kto_tag")), row.get("messages")
    if not isinstance(label, bool) or not isinstance(turns, list) or len(turns) < 2 or "completion" in row:
        return row
    rest = {key: value for key, value in row.items() if key not in ("messages", "kto_tag")}
    return {**rest, "prompt": turns[:-1], "completion": turns[-1:], "label": label}


def parted(prompt: Said | None, chosen: Said, rejected: Said) -> tuple[Said, Said, Said]:
    """(prompt, chosen, rejected), where the prompt may be the beginning that both answers share.

    Raises:
        RowError: the answers are equal, or one is empty, or they do not begin alike and there is no prompt.
    """
    if _bare(chosen) == _bare(rejected):
        raise RowError("'chosen' and 'rejected' are the same")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("'chosen' and 'rejected' must both be texts, or both be conversations")
    if prompt is None:
        prompt, chosen, rejected = _common(chosen, rejected)
    else:
        chosen, rejected = _without(prompt, chosen), _without(prompt, rejected)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not _bare(answer):
            raise RowError(f"'{name}' is empty" if isinstance(answer, str) else f"'{name}' has no answer in it")
    return prompt, chosen, rejected


def _common(chosen: Said, rejected: Said) -> tuple[Said, Said, Said]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        ends = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        shared = chosen[: next(ends, min(len(chosen), len(rejected)))]
        cut = max((i for i, c in enumerate(shared) if c.isspace()), default=0)  # words stay whole
        cut = len(shared[:cut].rstrip())
        if not cut:
            raise RowError("there is no 'prompt', and 'chosen' and 'rejected' do not begin alike")
        return chosen[:cut], chosen[cut:], rejected[cut:]
    assert isinstance(chosen, list) and isinstance(rejected, list)
    turns = 0
    while turns < min(len(chosen), len(rejected)) and chosen[turns] == rejected[turns]:
        turns += 1
    if not turns:
        raise RowError("there is no 'prompt', and 'chosen' and 'rejected' do not begin with the same turn")
    return chosen[:turns], chosen[turns:], rejected[turns:]


def _without(prompt: Said, answer: Said) -> Said:
    """The answer alone, where the column holds the whole conversation."""
    if isinstance(answer, list) and answer and answer[0]["role"] != "assistant":
        last = max((i for i, turn in enumerate(answer) if turn["role"] == "user"), default=len(answer))
        asked = [turn["content"] for turn in answer[: last + 1] if turn["role"] == "user"]
        known = prompt if isinstance(prompt, str) else [t["content"] for t in prompt if t["role"] == "user"][-1:]
        if asked and str(asked[-1]).strip() == str(known if isinstance(known, str) else "".join(known)).strip():
            return answer[last + 1 :]
        raise RowError("'chosen' or 'rejected' is a conversation that does not go on from 'prompt'")
    return answer


def _bare(said: Said) -> str:
    if isinstance(said, str):
        return said.strip()
    return "\n".join(f"{turn['role']}: {turn['content']}".strip() for turn in said if str(turn["content"]).strip())


def words(said: Said) -> str:
    """What is said, without its roles."""
    return said if isinstance(said, str) else " ".join(str(turn["content"]) for turn in said)


def facts(kind: str, rows: list[Example]) -> list[tuple[str, str]]:
    """What ``veneer data check`` tells of such rows: lengths against each other, classes, columns for rewards."""
    if kind == "preference":
        sizes = [tuple(len(words(e.extra[side]).split()) for side in ("chosen", "rejected")) for e in rows]
        longer = sum(a > b for a, b in sizes)
        middle = [statistics.median(side) for side in zip(*sizes, strict=True)]
        text = f"chosen {middle[0]:g} words in the middle, rejected {middle[1]:g}; chosen is the longer one in {longer}"
        return [("answers", text)]
    if kind == "kto":
        good = sum(e.extra["label"] for e in rows)
        return [("labels", f"{good:,} good, {len(rows) - good:,} bad")]
    if kind == "prompts":
        columns = [key for key in (rows[0].extra if rows else {}) if key != "prompt"]
        return [("columns", f"{', '.join(columns)} (reward functions see them)")] if columns else []
    return []


def faults(kind: str, rows: list[Example]) -> list[tuple[str, list[str], str]]:
    """What spoils such rows: (what, the rows it is true of, the remedy) each."""
    found = []
    if kind == "preference":
        seen: dict[tuple[str, str, str], str] = {}
        torn = []
        for e in rows:
            asked, chosen, rejected = (_bare(e.extra[key]) for key in ("prompt", "chosen", "rejected"))
            if (asked, rejected, chosen) in seen:
                torn.append(f"{e.where} (and {seen[asked, rejected, chosen]})")
            seen.setdefault((asked, chosen, rejected), e.where)
        found.append(("rows prefer what another row rejects", torn, "Keep the verdict you trust."))
    if kind == "kto" and (only := one_class(rows)):
        found.append((f"rows, and all of them are {only}", [e.where for e in rows], NEEDS_BOTH))
    return [one for one in found if one[1]]


NEEDS_BOTH = "KTO learns from good answers and bad ones; add rows of the other kind, or use task: sft on the good ones."


def one_class(rows: list[Example]) -> str | None:
    """``good`` or ``bad`` where all labels are the same."""
    labels = {bool(e.extra["label"]) for e in rows}
    return None if len(labels) != 1 else "good" if labels.pop() else "bad"
