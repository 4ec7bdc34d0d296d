"""Token classification: a tag for each word, such as the names of people and places in a sentence.

Words are joined by blanks and tokenised as a text; a word's first token learns its tag, its other tokens learn nothing.
Where the tags are those of spans (``B-PER``, ``I-PER``, ``O``; also with ``E-`` and ``S-``), whole spans are counted:

    F1 = 2 hits / (spans wanted + spans found),   a hit has the same beginning, end and kind
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.train import encoding
from veneer.train.classification import Labelling, agreement, by_class, logits_of
from veneer.train.config import RunConfig
from veneer.train.data import Example
from veneer.train.tasks import LOSS, Features, Material, Metric, asked, asked_of, batch_size, spelled
from veneer.train.tokens import IGNORED, Tokenised
from veneer.train.trainer import held_out_loss

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared

Span = tuple[int, int, str]
"""(first word, last word, kind)."""


class TokenClassification(Labelling):
    """Learns the tag of each word."""

    adapter_type = "TOKEN_CLS"
    auto = "AutoModelForTokenClassification"
    formats = ("tags",)
    metrics = (Metric("f1", True), Metric("accuracy", True), LOSS)
    prompts = "sentences"

    def labels(self, rows: list[Example]) -> list[tuple[str, str]]:
        """One a word."""
        return [(e.where, tag) for e in rows for tag in e.extra["tags"]]

    def encoded(self, rows: list[Example], names: list[str], tokenizer: Any, config: RunConfig) -> Tokenised:
        """Ids with one label a word."""
        return _encoded(rows, names, tokenizer, config)

    def features(self, material: Material) -> Features:
        """Ids with one label a word.

        Raises:
            ValueError: the tokenizer does not know the place of each token.
        """
        if not material.tokenizer.is_fast:
            raise ValueError("Token classification needs a fast tokenizer, which knows the place of each token.")
        return super().features(material)

    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """F1 of the spans (of the tags where they name no spans), accuracy of the tags, and loss.

        Words that were cut off are not counted.
        """
        names, rows = prepared.config.classes.names, prepared.held.rows
        guessed = _tags(rows, names, model, prepared.collate, batch_size(prepared))
        right = [[names[label] for label in row["labels"] if label != IGNORED] for row in rows]
        flat = [[names.index(tag) for tags in sentences for tag in tags] for sentences in (right, guessed)]
        found = agreement(*flat)
        self.answered = [pair for a, b in zip(right, guessed, strict=True) for pair in zip(a, b, strict=True)]
        if spanned(names):
            found["f1"] = span_f1(right, guessed)
            self.answered = matched(right, guessed)
        losses = self.losses(prepared, model)
        return {**found, "loss": held_out_loss(model, rows, prepared.collate, batch_size(prepared), losses)}

    def tables(self, prepared: Prepared) -> dict[str, dict[str, dict[str, float]]]:
        """Precision, recall and F1 of each kind of span, or of each tag."""
        names = sorted({name for pair in self.answered for name in pair if name})
        return {"Held-out rows by kind": by_class(self.answered, names)}

    # ---- before and after -------------------------------------------------------------------------------------------
    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Sentences with what is named in them."""
        sources = [asked_of(prepared).sources[i] for i in asked(prepared)]
        return [(str(one.text), _marked(one.extra["tokens"], one.extra["tags"])) for one in sources]

    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """What the model finds in them."""
        source = asked_of(prepared)
        rows = [source.rows[i] for i in asked(prepared)]
        tags = _tags(rows, prepared.config.classes.names, model, prepared.collate, batch_size(prepared))
        return [_marked(source.sources[i].extra["tokens"], one) for i, one in zip(asked(prepared), tags, strict=True)]

    def respond(
        self, config: RunConfig, tokenizer: Any, model: Any, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """``answer``, what is named in the text, and ``tokens`` with their ``tags``."""
        words = [row["tokens"] if isinstance(row.get("tokens"), list) else str(row["text"]).split() for row in rows]
        names = config.classes.names
        encoded = [_row(tokenizer, one, [0] * len(one), config)[0] for one in words]
        found = _tags(encoded, names, model, encoding.Pad(tokenizer), 8)
        return [
            {"answer": _marked(one, tags), "tokens": one[: len(tags)], "tags": tags}
            for one, tags in zip(words, found, strict=True)
        ]

    # ---- the plan ---------------------------------------------------------------------------------------------------
    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """The tags with their shares, and how many words learn one."""
        train = prepared.train
        words = f"{train.tokens:,} an epoch, {train.learnt:,} of them the first of a word, which learns its tag"
        return [("tags", prepared.renderer.histogram()), ("tokens", words)]

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The first sentence; green is the token that learns its word's tag."""
        row, names = prepared.train.rows[0], prepared.config.classes.names
        learnt = [label != IGNORED for label in row["labels"]]
        tags = " ".join(names[label] for label in row["labels"] if label != IGNORED)
        return [*spelled(prepared.tokenizer, row["input_ids"], learnt), ("  → ", False), (tags, True)]


def spanned(names: list[str]) -> bool:
    """Whether the tags are those of spans."""
    return all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for name in names)


def spans(tags: list[str]) -> list[Span]:
    """The spans of one sentence. A span that begins with ``I-`` counts as one, as it does for conlleval."""
    found: list[Span] = []
    start, kind = None, ""
    for i, tag in enumerate([*tags, "O"]):
        mark, now = tag[0], tag[2:]
        if start is not None and not (mark in "IEL" and now == kind):
            found.append((start, i - 1, kind))
            start = None
        if start is None and mark != "O":
            start, kind = i, now
        if start is not None and mark in "ESLU":
            found.append((start, i, kind))
            start = None
    return found


def span_f1(right: list[list[str]], guessed: list[list[str]]) -> float:
    """F1 over the spans of all sentences; 1 where there are none and none was found."""
    hits = wanted = said = 0
    for truth, guess in zip(right, guessed, strict=True):
        a, b = set(spans(truth)), set(spans(guess))
        hits, wanted, said = hits + len(a & b), wanted + len(a), said + len(b)
    return 2 * hits / (wanted + said) if wanted + said else 1.0


def matched(right: list[list[str]], guessed: list[list[str]]) -> list[tuple[str, str]]:
    """(kind, kind) of spans that were found, (kind, "") of those that were not, ("", kind) of those that are none."""
    found = []
    for truth, guess in zip(right, guessed, strict=True):
        a, b = set(spans(truth)), set(spans(guess))
        found += [(kind, kind) for *_, kind in a & b]
        found += [(kind, "") for *_, kind in a - b] + [("", kind) for *_, kind in b - a]
    return found


def _marked(words: list[str], tags: list[str]) -> str:
    """``Ada Lovelace: PER, London: LOC``; the tags themselves where they name no spans."""
    if not spanned(tags):
        return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=False))
    found = [f"{' '.join(words[a : b + 1])}: {kind}" for a, b, kind in spans(tags)]
    return ", ".join(found) or "nothing"


def _tags(rows: list[Any], names: list[str], model: Any, collate: Any, batch: int) -> list[list[str]]:
    """The likeliest tag of each word that is in the rows."""
    found: list[list[str]] = [[]] * len(rows)
    for some, sent, logits in encoding.outputs(model, rows, collate, batch, logits_of):
        best = logits[:, -sent["input_ids"].shape[1] :].argmax(-1)
        for i, line in zip(some, best.tolist(), strict=True):
            found[i] = [names[tag] for tag, label in zip(line, rows[i]["labels"], strict=False) if label != IGNORED]
    return found


def _row(tokenizer: Any, words: list[str], labels: list[int], config: RunConfig) -> tuple[dict[str, Any], int]:
    """One sentence: ids, and at the first token of each word its label; its length before it was cut."""
    starts, at = {}, 0
    for number, word in enumerate(words):
        starts.update(dict.fromkeys(range(at, at + len(word)), number))
        at += len(word) + 1
    (row,), (length,) = encoding.encode(tokenizer, [" ".join(words)], None, config.data.max_length, offsets=True)
    seen: set[int] = set()
    placed = []
    for first, end in row.pop("offsets"):
        of = starts.get(end - 1) if end > first else None  # by its last character: some tokens begin with a blank
        placed.append(labels[of] if of is not None and of not in seen else IGNORED)
        seen |= {of} if of is not None else set()
    return {**row, "labels": placed}, length


def _encoded(examples: list[Example], names: list[str], tokenizer: Any, config: RunConfig) -> Tokenised:
    made, number = Tokenised(), {name: i for i, name in enumerate(names)}
    for example in examples:
        labels = [number[tag] for tag in example.extra["tags"]]
        row, length = _row(tokenizer, example.extra["tokens"], labels, config)
        if all(label == IGNORED for label in row["labels"]):
            made.lengths.append(length)
            made.counts["dropped_unlearnt"] += 1
            continue
        encoding.keep(made, example, row, length, config)
    return made
