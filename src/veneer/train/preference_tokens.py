"""Pairs, labelled answers and prompts as token ids: the chat template, the end token and the limits are those of SFT.

Rows keep ``input_ids`` and ``labels`` (of the chosen answer, or of the prompt), so that the plan shows them as it shows
any other row; what the trainers read stands beside them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from veneer.train.data import Example
from veneer.train.preference_rows import Said
from veneer.train.tokens import IGNORED, Renderer, Tokenised

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids", "label")


@dataclass
class Compared(Tokenised):
    """Tokenised rows whose answers are several.

    Attributes:
        times: answers that the model itself writes to each prompt.
        room: their tokens at most.
    """

    times: int = 1
    room: int = 0

    @property
    def tokens(self) -> int:
        return self.times * sum(size(row) + self.room for row in self.rows)

    @property
    def learnt(self) -> int:
        return sum(
            len(row.get(name, [])) for row in self.rows for name in ("chosen_ids", "rejected_ids", "completion_ids")
        )


def size(row: dict[str, Any]) -> int:
    """Tokens of the sequences that a row's step reads."""
    answers = [row[name] for name in COLUMNS[1:5] if name in row]
    return sum(len(row["prompt_ids"]) + len(answer) for answer in answers) or len(row["prompt_ids"])


def renderer(tokenizer: Any, examples: list[Example], template: str, system: str | None) -> Renderer:
    """A renderer for answers to these examples; texts are turned into a chat where the tokenizer has a template.

    Raises:
        ValueError: conversations, and no chat template.
    """
    turns = any(isinstance(value, list) for e in examples for value in e.extra.values() if _is_said(value))
    # Two texts cut where they differ go on from each other; a prompt of its own is a question.
    joined = sum(isinstance(e.extra.get("chosen"), str) and e.extra["chosen"][:1].isspace() for e in examples)
    return Renderer(
        tokenizer, "messages" if turns else "prompt", template, "completion", system, 2 * joined > len(examples)
    )


def _is_said(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def lengths(kind: str, examples: list[Example], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of each row's prompt, and of its prompt with its longest answer, for ``data check``.

    Raises:
        ValueError: a conversation that the template refuses, by file and row; or there is no template.
    """
    made = renderer(tokenizer, examples, "auto", None)
    if kind == "prompts":
        asked = [len(row["prompt_ids"]) for row in prompts(examples, made, 2**31).rows]
        return asked, asked
    names = ("chosen", "rejected") if kind == "preference" else ("completion",)
    sides = [_split([answered(e.where, e.extra["prompt"], e.extra[name]) for e in examples], made) for name in names]
    asked = [len(prompt) for prompt, _ in sides[0]]
    longest = [max(len(side[i][1]) for side in sides) for i in range(len(examples))]
    return asked, [a + b for a, b in zip(asked, longest, strict=True)]


def answered(where: str, prompt: Said, answer: Said) -> Example:
    """A prompt with one answer, as the renderer takes it."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"role": "assistant", "content": answer.strip()}] if isinstance(answer, str) else answer
    if isinstance(prompt, str) and isinstance(answer, str):
        return Example(where, messages=[*asked, *said], prompt=prompt, completion=answer)
    return Example(where, messages=[*asked, *said])


def pairs(examples: list[Example], renderer: Renderer, max_length: int, too_long: str = "truncate") -> Compared:
    """{prompt, chosen, rejected} as ids. Where an answer is cut, both keep what fits after the prompt.

    Raises:
        ValueError: a conversation that the template refuses, or whose answers differ before the last turn, by file and
            row; or no pair is left.
    """
    result = Compared(counts=renderer.counts)
    sides = {
        name: _split([answered(e.where, e.extra["prompt"], e.extra[name]) for e in examples], renderer)
        for name in ("chosen", "rejected")
    }
    for example, (asked, chosen), (other, rejected) in zip(examples, sides["chosen"], sides["rejected"], strict=True):
        if asked != other:
            raise ValueError(f"{example.where}: 'chosen' and 'rejected' differ before their last turn.")
        length = len(asked) + max(len(chosen), len(rejected))
        result.lengths.append(length)
        room = max_length - len(asked)
        if not _fits(result, length, room, max_length, too_long):
            continue
        chosen, rejected = chosen[:room], rejected[:room]
        if chosen == rejected:
            result.counts["dropped_alike"] += 1
            continue
        row: dict[str, Any] = {"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected}
        _keep(result, answered(example.where, example.extra["prompt"], example.extra["chosen"]), row, chosen, renderer)
    return _some(result, examples, "pair", max_length)


def labelled(
    examples: list[Example], renderer: Renderer, max_length: int, too_long: str = "truncate", seed: int = 0
) -> Compared:
    """{prompt, completion, label} as ids, each with the answer to another prompt, from which KTO estimates its KL term.

    Raises:
        ValueError: as ``pairs``.
    """
    result = Compared(counts=renderer.counts)
    sources = [answered(e.where, e.extra["prompt"], e.extra["completion"]) for e in examples]
    for example, source, (asked, said) in zip(examples, sources, _split(sources, renderer), strict=True):
        length = len(asked) + len(said)
        result.lengths.append(length)
        room = max_length - len(asked)
        if not _fits(result, length, room, max_length, too_long):
            continue
        row: dict[str, Any] = {
            "prompt_ids": asked,
            "completion_ids": said[:room],
            "label": bool(example.extra["label"]),
        }
        _keep(result, source, row, said[:room], renderer)
    _some(result, examples, "row", max_length)
    order = list(range(len(result.rows)))
    random.Random(seed).shuffle(order)  # TRL reads these rows in their order
    result.rows, result.sources = [result.rows[i] for i in order], [result.sources[i] for i in order]
    for row, other in zip(result.rows, [*result.rows[1:], *result.rows[:1]], strict=True):
        row["KL_completion_ids"] = other["completion_ids"][: max_length - len(row["prompt_ids"])]
    return result


def prompts(examples: list[Example], renderer: Renderer, max_length: int) -> Compared:
    """Prompts for a model to answer: their text or turns, and all their columns, which rewards may read.

    Raises:
        ValueError: a prompt that the template refuses, by file and row; or all are longer than ``max_length``.
    """
    result = Compared(counts=renderer.counts)
    for example in examples:
        turns = asked_turns(example, renderer.system)
        try:
            text = renderer.chat(turns) if renderer.template == "chat" else str(turns[-1]["content"])
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}.") from None
        ids = renderer.tokenizer(text, add_special_tokens=renderer.template != "chat")["input_ids"]
        result.lengths.append(len(ids))
        if len(ids) > max_length:
            result.counts["dropped_long"] += 1
            continue
        extra = {key: value for key, value in example.extra.items() if key != "prompt"}
        row = {"input_ids": ids, "labels": [IGNORED] * len(ids), "prompt_ids": ids}
        result.rows.append({**row, "prompt": turns if renderer.template == "chat" else text, "columns": extra})
        result.sources.append(
            Example(example.where, messages=[*turns, {"role": "assistant", "content": ""}], prompt=text)
        )
    return _some(result, examples, "prompt", max_length)


def asked_turns(example: Example, system: str | None = None) -> list[dict[str, Any]]:
    """The turns up to the answer that is wanted."""
    said = example.extra.get("prompt", example.prompt)
    turns = [{"role": "user", "content": str(said)}] if not isinstance(said, list) else list(said)
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def ids_of(examples: list[Example], renderer: Renderer) -> list[list[int]]:
    """The ids of prompt and answer, as the pairs have them."""
    return [asked + said for asked, said in _split(examples, renderer)]


def _split(examples: list[Example], renderer: Renderer) -> list[tuple[list[int], list[int]]]:
    """(ids of the prompt, ids of the answer with its end token) of each example."""
    found = []
    for ids, labels in renderer.encode_all(examples):
        start = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
        stop = len(ids) - next((i for i, label in enumerate(reversed(labels)) if label != IGNORED), 0)
        found.append((ids[:start], ids[start:stop]))
    return found


def _fits(result: Compared, length: int, room: int, max_length: int, too_long: str) -> bool:
    if room < 1:
        result.counts["dropped_unlearnt"] += 1
        return False
    if length > max_length:
        result.counts["truncated" if too_long == "truncate" else "dropped_long"] += 1
        return too_long == "truncate"
    return True


def _keep(result: Compared, source: Example, row: dict[str, Any], answer: list[int], renderer: Renderer) -> None:
    asked = row["prompt_ids"]
    result.counts["ends_learnt"] += any(token in renderer.specials for token in answer)
    result.rows.append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer, **row})
    result.sources.append(source)


def _some(result: Compared, examples: list[Example], what: str, max_length: int) -> Compared:
    if examples and not result.rows:
        raise ValueError(
            f"None of the {len(examples)} {what}s is left within data.max_length {max_length} (the longest has "
            f"{max(result.lengths)} tokens). Raise data.max_length."
        )
    return result
