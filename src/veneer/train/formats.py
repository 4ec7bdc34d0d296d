"""What rows may look like, and how each kind becomes an example.

alpaca     {instruction, input?, output}            messages   {messages: [{role, content}]}
prompt     {prompt, completion}                     sharegpt   {conversations: [{from, value}]}
text       {text}, or a .txt file with paragraphs divided by blank lines
labels     {text, text_pair?, label}                tags       {tokens: [...], tags: [...]}
pairs      {anchor, positive, negative?}            preference {prompt?, chosen, rejected}
prompts    {prompt, ...}                            kto        {prompt, completion, label: true or false}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from veneer.train import preference_rows
from veneer.train.rows import Row, RowError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {"chatgpt": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
ROLES |= {"function": "tool", "developer": "system"}


@dataclass(frozen=True)
class Format:
    """How rows of one shape become examples."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]


def _string(row: Row, key: str, empty: bool = False) -> str:
    value = row.get(key)
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        raise RowError(f"'{key}' must be text, and is {brief(value)}")
    if not value.strip() and not empty:
        raise RowError(f"'{key}' is empty")
    return value


def _alpaca(row: Row) -> dict[str, Any]:
    instruction, extra = _string(row, "instruction"), _string(row, "input", empty=True)
    messages = [{"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _string(row, "system")})
    messages.append({"role": "assistant", "content": _string(row, "output")})
    return {"messages": messages, "prompt": alpaca_prompt(instruction, extra), "completion": _string(row, "output")}


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """The prompt of the Stanford Alpaca data set, for tokenizers without a chat template."""
    if extra.strip():
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n"
    )


def _prompt(row: Row) -> dict[str, Any]:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return {"messages": _turns([*row["prompt"], *row["completion"]], "role", "content")}
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": _string(row, "system")})
    return {"prompt": prompt, "completion": completion, "messages": turns}


def _messages(row: Row) -> dict[str, Any]:
    return {"messages": _turns(row["messages"], "role", "content"), "tools": row.get("tools")}


def _sharegpt(row: Row) -> dict[str, Any]:
    turns = _turns(row["conversations"], "from", "value")
    if row.get("system") and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": _string(row, "system")})
    return {"messages": turns, "tools": row.get("tools") or None}


def _turns(value: Any, role_key: str, text_key: str, answered: bool = True) -> list[Row]:
    value = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if not isinstance(value, list) or not value:
        raise RowError(f"the conversation must be a list of turns, and is {brief(value)}")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or role_key not in turn:
            raise RowError(f"turn {number} must have '{role_key}' and '{text_key}', and is {brief(turn)}")
        role = ROLES.get(str(turn[role_key]).lower())
        if role is None:
            raise RowError(f"turn {number} has the role '{turn[role_key]}'; known are {', '.join(sorted(ROLES))}")
        content = turn.get(text_key)
        if content is None and not turn.get("tool_calls"):
            raise RowError(f"turn {number} ({role}) has no '{text_key}'")
        rest = {k: v for k, v in turn.items() if k not in (role_key, text_key) and v is not None}
        turns.append({"role": role, "content": content if content is not None else "", **rest})
    if answered and not any(turn["role"] == "assistant" for turn in turns):
        raise RowError("the conversation has no assistant turn to learn from")
    return turns


def _labels(row: Row) -> dict[str, Any]:
    label = row["label"]
    if label is None or isinstance(label, list | dict | float) or not str(label).strip():
        raise RowError(f"'label' must be one class, a word or a whole number, and is {brief(label)}")
    pair = {"pair": _string(row, "text_pair")} if row.get("text_pair") is not None else {}
    return {"text": _string(row, "text"), "extra": {"label": str(label).strip(), **pair}}


def _tags(row: Row) -> dict[str, Any]:
    tokens, tags = (_listed(row, key) for key in ("tokens", "tags"))
    if len(tokens) != len(tags):
        raise RowError(f"there are {len(tokens)} tokens and {len(tags)} tags")
    return {"text": " ".join(tokens), "extra": {"tokens": tokens, "tags": tags}}


def _listed(row: Row, key: str) -> list[str]:
    """A list of words; tables without lists write them with blanks between, or as JSON."""
    value = row[key]
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else value.split()
    if not isinstance(value, list) or not value or not all(isinstance(one, str | int) and str(one) for one in value):
        raise RowError(f"'{key}' must be a list of words, and is {brief(value)}")
    return [str(one) for one in value]


def _pairs(row: Row) -> dict[str, Any]:
    negative = {"negative": _string(row, "negative")} if row.get("negative") is not None else {}
    return {"text": _string(row, "anchor"), "extra": {"positive": _string(row, "positive"), **negative}}


def _preference(row: Row) -> dict[str, Any]:
    places = ("prompt", "conversations", "messages", "instruction")
    named = next((key for key in places if row.get(key) is not None), None)
    asked = _said(row, named) if named else None
    if named == "instruction" and str(row.get("input") or "").strip():
        asked = f"{asked}\n\n{row['input']}"
    prompt, chosen, rejected = preference_rows.parted(asked, _said(row, "chosen"), _said(row, "rejected"))
    return {"prompt": _question(prompt), "extra": {"prompt": prompt, "chosen": chosen, "rejected": rejected}}


def _kto(row: Row) -> dict[str, Any]:
    words = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}
    label = words.get(str(row["label"]).lower())
    if label is None:
        raise RowError(f"'label' must be true or false, and is {brief(row['label'])}")
    prompt, completion = _said(row, "prompt"), _said(row, "completion")
    return {"prompt": _question(prompt), "extra": {"prompt": prompt, "completion": completion, "label": label}}


def _prompts(row: Row) -> dict[str, Any]:
    return {"prompt": _question(_said(row, "prompt")), "extra": dict(row)}


def _said(row: Row, key: str) -> Any:
    """A text, or turns of a conversation, or one turn of it."""
    value = row.get(key)
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list):
        sharegpt = bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
        return _turns(turns, *(("from", "value") if sharegpt else ("role", "content")), answered=False)
    return _string(row, key)


def _question(said: Any) -> str:
    return said if isinstance(said, str) else next((str(t["content"]) for t in said if t["role"] == "user"), "")


FORMATS = {
    "preference": Format(("chosen", "rejected"), ("prompt",), _preference),
    "kto": Format(("prompt", "completion", "label"), (), _kto),
    "tags": Format(("tokens", "tags"), (), _tags),
    "pairs": Format(("anchor", "positive"), ("negative",), _pairs),
    "labels": Format(("text", "label"), ("text_pair",), _labels),
    "messages": Format(("messages",), ("tools",), _messages),
    "sharegpt": Format(("conversations",), ("system", "tools"), _sharegpt),
    "alpaca": Format(("instruction", "output"), ("input", "system"), _alpaca),
    "prompt": Format(("prompt", "completion"), ("system",), _prompt),
    "text": Format(("text",), (), lambda row: {"text": _string(row, "text")}),
    "prompts": Format(("prompt",), (), _prompts),
}
TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "message",
    "headline",
    "title",
    "document",
    "comment",
    "tweet",
    "body",
)
ANSWERS = [("question", "answer"), ("query", "response"), ("input", "output"), ("source", "target"), ("q", "a")]
GUESSES: dict[str, list[dict[str, tuple[str, ...]]]] = {
    "prompt": [{"prompt": (asked,), "completion": (said,)} for asked, said in ANSWERS],
    "tags": [{"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "pos_tags", "labels", "ner")}],
    "labels": [
        {"text": TEXTS, "label": ("label", "category", "class", "topic", "sentiment", "intent", "target", "labels")}
    ],
    "pairs": [
        {"anchor": ("anchor", "query", "question"), "positive": ("positive", "pos", "document", "passage", "answer")},
        {"anchor": ("sentence1", "premise", "text1"), "positive": ("sentence2", "hypothesis", "text2")},
    ],
}
"""Format -> names by which its columns go elsewhere."""
ANSWERED = ("messages", "sharegpt", "alpaca", "prompt")
"""Formats of questions with one answer each."""


def detect(row: Row, where: str = "the first row", among: Iterable[str] = FORMATS) -> str:
    """The format of ``among`` whose columns ``row`` has.

    Raises:
        ValueError: none fits; names the columns found and the mapping to write.
    """
    kinds = {name: kind for name, kind in FORMATS.items() if name in tuple(among)}
    for name, kind in kinds.items():
        if all(key in row for key in kind.required):
            return name
    wanted = "; ".join(f"{name}: {', '.join(kind.required)}" for name, kind in kinds.items())
    columns = (recognise(row, kinds) or ("", {}))[1]
    if not columns:
        ours = ("prompt", "completion") if "prompt" in kinds else next(iter(kinds.values())).required[-2:]
        columns = dict(zip(ours, map(str, row) if len(row) >= len(ours) else (f"YOUR_{one}" for one in ours)))
    mapping = ", ".join(f"{mine}: {yours}" for mine, yours in columns.items())
    raise ValueError(
        f"{where} has the columns {', '.join(map(str, row))}, which fit no known format ({wanted}). "
        f"Map yours to ours, for instance  data: {{columns: {{{mapping}}}}}."
    )


def recognise(row: Row, among: Iterable[str] = FORMATS) -> tuple[str, dict[str, str]] | None:
    """(format, our column -> the row's) by the names that columns often have elsewhere, or None."""
    names = {str(name).lower(): str(name) for name in row}
    for kind, choices in GUESSES.items():
        for known in choices if kind in tuple(among) else ():
            found = {ours: next((names[one] for one in theirs if one in names), "") for ours, theirs in known.items()}
            if all(found.values()):
                return kind, {ours: yours for ours, yours in found.items() if yours != ours}
    return None


def brief(value: Any) -> str:
    """A value in a sentence, cut where it is long."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
