"""A look over data before anything is trained on it: what is in it, what is wrong, in which rows, and what to do."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from veneer.train import data, formats, preference_rows
from veneer.train.data import Example

SHOWN = 5


@dataclass
class Finding:
    """Something about the data, the rows it is true of, and the remedy."""

    what: str
    rows: list[str]
    remedy: str

    def __str__(self) -> str:
        more = f" and {len(self.rows) - SHOWN} more" if len(self.rows) > SHOWN else ""
        return f"{len(self.rows)} {self.what}: {', '.join(self.rows[:SHOWN])}{more}. {self.remedy}"


@dataclass
class Diagnosis:
    """What ``check`` found."""

    facts: list[tuple[str, str]]
    findings: list[Finding] = field(default_factory=list)


def check(
    files: list[str],
    held: list[str] | None = None,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    tokenizer: Any = None,
    max_length: int = 1024,
) -> Diagnosis:
    """Read data and look for what spoils a training run.

    Args:
        files: training data.
        held: held-out data, for leaks.
        format: as in the settings.
        columns: as in the settings.
        tokenizer: a transformers tokenizer, to look for rows that are too long or cannot be rendered.
        max_length: what too long means.

    Raises:
        ValueError: no row can be used.
        FileNotFoundError: a file that is not there.
    """
    found = data.load(files, format, columns, "skip")
    other = data.load(held, format, columns, "skip") if held else data.Examples()
    facts = [
        ("files", ", ".join(found.files)),
        ("format", found.format),
        ("rows", f"{len(found):,} usable, {len(found.skipped):,} not" + (f"; {len(other):,} held out" if held else "")),
    ]
    shapes = Counter(" ".join(turn["role"][0].upper() for turn in e.messages) for e in found.rows if e.messages)
    if shapes:
        common = ", ".join(f"{shape} ({count:,})" for shape, count in shapes.most_common(4))
        facts.append(("turns", f"{common}  S system, U user, A assistant, T tool"))
    diagnosis = Diagnosis(facts)
    broken = [*found.skipped, *other.skipped]
    if broken:
        diagnosis.findings.append(Finding("rows cannot be used", broken, "Mend them, or set data.bad_rows: skip."))
    if labels := _labels(found.rows):
        facts.append(("classes", _shares(Counter(label for _, label in labels))))
    facts += preference_rows.facts(found.format, found.rows)
    for finding in (
        *(Finding(*fault) for fault in preference_rows.faults(found.format, found.rows)),
        *_turns(found.rows),
        *_repeats(found.rows),
        *_leaks(found.rows, other.rows),
        *_classes(labels, _labels(other.rows)),
        *_spans(found.rows),
    ):
        diagnosis.findings.append(finding)
    if tokenizer is not None:
        _lengths(diagnosis, found, tokenizer, max_length)
    return diagnosis


def _turns(rows: list[Example]) -> list[Finding]:
    empty, order, trailing = [], [], []
    for example in rows:
        turns = example.messages or []
        if any(
            turn["role"] == "assistant" and not str(turn["content"]).strip() and "tool_calls" not in turn
            for turn in turns
        ):
            empty.append(example.where)
        roles = [turn["role"] for turn in turns if turn["role"] != "system"]
        if any(a == b != "tool" for a, b in itertools.pairwise(roles)):
            order.append(example.where)
        if roles and roles[-1] == "user":
            trailing.append(example.where)
    found = [
        Finding("rows have an empty answer", empty, "The model would learn to say nothing; remove them."),
        Finding("rows have two turns of one role in a row", order, "Many chat templates refuse that; join the turns."),
        Finding("rows end with the user", trailing, "What follows the last answer is left out."),
    ]
    return [one for one in found if one.rows]


def _repeats(rows: list[Example]) -> list[Finding]:
    seen: dict[tuple[str, str], str] = {}
    answers: dict[str, tuple[str, str]] = {}
    same, torn = [], []
    for example in rows:
        question, answer = example.question, _answer(example)
        if (question, answer) in seen:
            same.append(f"{example.where} (as {seen[question, answer]})")
        elif question in answers and not (example.messages and len(example.messages) > 3) and not _many(example):
            torn.append(f"{example.where} (and {answers[question][1]})")
        seen.setdefault((question, answer), example.where)
        answers.setdefault(question, (answer, example.where))
    found = [
        Finding("rows are there twice", same, "Remove the repetitions, unless they are meant as weights."),
        Finding(
            "rows answer a prompt otherwise than another row", torn, "Fine where answers may differ; else mend them."
        ),
    ]
    return [one for one in found if one.rows]


def _many(example: Example) -> bool:
    """Whether a prompt may well come with several answers: preferences, prompts to try, texts that belong together."""
    return bool(example.extra) and not {"label", "tags"} & example.extra.keys() or "completion" in example.extra


def _leaks(rows: list[Example], held: list[Example]) -> list[Finding]:
    known = {example.question: example.where for example in rows}
    both = [f"{one.where} (as {known[one.question]})" for one in held if one.question in known]
    return (
        [Finding("held-out prompts are in the training rows", both, "Remove them, or the score is of memory.")]
        if both
        else []
    )


def _labels(rows: list[Example]) -> list[tuple[str, str]]:
    """(row, class) of labelled texts, and of each word of tagged ones."""
    tags = [(e.where, tag) for e in rows for tag in e.extra.get("tags", ()) if isinstance(tag, str)]
    return tags or [(e.where, e.extra["label"]) for e in rows if isinstance(e.extra.get("label"), str)]


def _shares(counts: Counter[str], shown: int = 12) -> str:
    total, common = counts.total(), counts.most_common()
    parts = [f"{name} {count:,} ({100 * count / total:.0f} %)" for name, count in common[:shown]]
    return f"{len(counts)}: {', '.join(parts)}" + (f", and {len(common) - shown} more" if len(common) > shown else "")


def _classes(train: list[tuple[str, str]], held: list[tuple[str, str]]) -> list[Finding]:
    """Classes that cannot be learnt, and classes that are probably one."""
    counts = Counter(label for _, label in train)
    alike: dict[str, str] = {}
    for label, _ in counts.most_common():  # the commonest spelling first
        alike.setdefault(label.casefold().strip(), label)
    torn = [
        f"{where} ('{label}' for '{alike[label.casefold().strip()]}')"
        for where, label in train
        if alike[label.casefold().strip()] != label
    ]
    unknown = [f"{where} ('{label}')" for where, label in held if label not in counts]
    few = [f"{where} ('{label}')" for where, label in train if counts[label] < 3]
    found = [
        Finding(
            "labels are written otherwise than elsewhere", torn, "They would be classes of their own; spell them alike."
        ),
        Finding("held-out labels are in no training row", unknown, "They cannot be learnt; add rows, or drop these."),
        Finding("labels are in fewer than three rows", few, "Too few to learn from; add rows, or join classes."),
    ]
    return [one for one in found if one.rows]


def _spans(rows: list[Example]) -> list[Finding]:
    """Tags that go on with a span which has not begun."""
    loose = [
        example.where
        for example in rows
        if "tags" in example.extra
        and any(
            b.startswith("I-") and a[1:] != b[1:]
            for a, b in itertools.pairwise(["O", *map(str, example.extra["tags"])])
        )
        and any(str(tag).startswith("B-") for tag in example.extra["tags"])
    ]
    return [Finding("rows have an I- tag without a B- before", loose, "It counts as the beginning.")] if loose else []


def _lengths(diagnosis: Diagnosis, found: data.Examples, tokenizer: Any, max_length: int) -> None:
    if found.format in ("preference", "kto", "prompts"):
        from veneer.train import preference_tokens  # as below

        asked, whole = preference_tokens.lengths(found.format, found.rows, tokenizer)
        where = [example.where for example in found.rows]
        _long(diagnosis, where, whole, max_length)
        full = [row for row, count in zip(where, asked, strict=True) if count >= max_length]
        if full:
            remedy = "Nothing of their answers is left; shorten them, or raise data.max_length."
            diagnosis.findings.append(Finding(f"prompts alone fill {max_length} tokens", full, remedy))
        return
    if found.format not in (*formats.ANSWERED, "text"):
        encoded = tokenizer([str(e.text or e.prompt) for e in found.rows], verbose=False)["input_ids"]
        _long(diagnosis, [e.where for e in found.rows], [len(ids) for ids in encoded], max_length)
        return
    from veneer.train.tokens import Renderer  # pulls in nothing but is needed with a tokenizer only

    renderer = Renderer(tokenizer, found.format, continues=data.continues(found.rows))
    refused, rows = [], []
    for example in found.rows:
        try:
            rows.append((example, renderer.pieces(example)))
        except ValueError as error:
            refused.append(f"{example.where} ({error})")
    encoded = renderer.encode([pieces for _, pieces in rows])
    if refused:
        diagnosis.findings.append(Finding("rows are refused by the chat template", refused, "Mend their turns."))
    _long(diagnosis, [example.where for example, _ in rows], [len(ids) for ids, _ in encoded], max_length)


def _long(diagnosis: Diagnosis, where: list[str], counts: list[int], max_length: int) -> None:
    lengths = sorted(counts)
    if lengths:
        middle, most = lengths[len(lengths) // 2], lengths[-1]
        diagnosis.facts.append(
            ("tokens", f"{sum(lengths):,} in all, {middle:,} in the middle row, {most:,} in the longest")
        )
    long = [row for row, count in zip(where, counts, strict=True) if count > max_length]
    if long:
        remedy = "They will be cut there; raise data.max_length, or set data.too_long: drop."
        diagnosis.findings.append(Finding(f"rows are longer than {max_length} tokens", long, remedy))


def _answer(example: Example) -> str:
    if example.extra:
        return str({key: value for key, value in example.extra.items() if key != "prompt"})
    if example.messages is not None:
        return next((str(t["content"]) for t in reversed(example.messages) if t["role"] == "assistant"), "")
    return example.completion if example.completion is not None else example.text or ""
