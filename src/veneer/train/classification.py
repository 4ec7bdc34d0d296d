"""Sequence classification: one class for a text, or for a pair of texts.

The classes are those of the data, named in the settings and in the model's config. The head is new, trains as a whole
and is saved with the adapter; decoders without a padding token get one, since they read the class off the last token.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.train import encoding
from veneer.train.config import RunConfig
from veneer.train.data import Example
from veneer.train.evaluate import pad_token
from veneer.train.sft import fits
from veneer.train.tasks import LOSS, Features, Losses, Material, Metric, Task, asked, asked_of, batch_size, spelled
from veneer.train.tokens import Tokenised

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared

SHOWN, MOST_CLASSES = 12, 30


@dataclass
class Labels:
    """The classes, and how many training rows (or words) have each of them."""

    names: list[str]
    counts: Counter[str]

    def weights(self) -> Tensor:
        """(classes,) the inverse of each class' share, so that all weigh the same and a row weighs 1 on average."""
        present = [name for name in self.names if self.counts[name]]
        total = self.counts.total()
        return torch.tensor([total / (len(present) * self.counts[n]) if self.counts[n] else 0.0 for n in self.names])

    def histogram(self) -> str:
        """``8: earn 2,840 (52 %), acq 1,596 (29 %), ...``."""
        total, common = self.counts.total(), self.counts.most_common()
        parts = [f"{name} {count:,} ({100 * count / total:.0f} %)" for name, count in common[:SHOWN]]
        rest = f", and {len(common) - SHOWN} more" if len(common) > SHOWN else ""
        return f"{len(self.names)}: {', '.join(parts)}{rest}"


class Labelling(Task):
    """What tasks that learn named labels share, whatever it is that carries a label."""

    def __init__(self) -> None:
        self.answered: list[tuple[str, str]] = []
        """(right, guessed) of what was measured last; "" where there is no such span."""

    def labels(self, rows: list[Example]) -> list[tuple[str, str]]:
        """(where it stands, label) of everything in ``rows`` that carries one."""
        raise NotImplementedError

    def encoded(self, rows: list[Example], names: list[str], tokenizer: Any, config: RunConfig) -> Tokenised:
        """Ids and the numbers of the labels."""
        raise NotImplementedError

    def features(self, material: Material) -> Features:
        """Ids with their labels."""
        config, tokenizer = material.config, material.tokenizer
        train, held = self.labels(material.rows), self.labels(material.held)
        names = classes(config, material.base, train, held, material.notices)
        self.settle(config, material.base, tokenizer)
        encoding.limit(config, material.base, tokenizer, material.adapter)
        held_ids = self.encoded(material.held, names, tokenizer, config)
        made = Features(self.encoded(material.rows, names, tokenizer, config), held_ids)
        made.collate = encoding.Pad(tokenizer)
        made.renderer = Labels(names, Counter(label for _, label in train))
        material.notices += encoding.notices(made.train, config)
        fits(made.train, material.base, config)
        return made

    def settle(self, config: RunConfig, base: Any, tokenizer: Any) -> Any:
        """The base's config with the labels' names."""
        base.id2label = dict(enumerate(config.classes.names))
        base.label2id = {name: i for i, name in base.id2label.items()}
        return base

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """-log p of each label, rare ones weighed up if ``classes.balanced``."""
        weights = prepared.renderer.weights() if prepared.config.classes.balanced else None
        return partial(label_losses, weights=weights)


class SequenceClassification(Labelling):
    """Learns which class a text belongs to."""

    adapter_type = "SEQ_CLS"
    auto = "AutoModelForSequenceClassification"
    formats = ("labels",)
    metrics = (Metric("accuracy", True), Metric("f1", True), LOSS)
    prompts = "texts"

    def labels(self, rows: list[Example]) -> list[tuple[str, str]]:
        """One a row."""
        return [(e.where, e.extra["label"]) for e in rows]

    def encoded(self, rows: list[Example], names: list[str], tokenizer: Any, config: RunConfig) -> Tokenised:
        """Ids with one label a row."""
        return _encoded(rows, names, tokenizer, config)

    def settle(self, config: RunConfig, base: Any, tokenizer: Any) -> Any:
        """The base's config with the classes' names and a padding token."""
        super().settle(config, base, tokenizer)
        base.problem_type = "single_label_classification"
        if base.get_text_config().pad_token_id is None:
            base.get_text_config().pad_token_id = pad_token(tokenizer)
        return base

    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """Accuracy, macro F1 and loss."""
        rows, right, guessed, total = prepared.held.rows, [], [], 0.0
        for some, _, logits in encoding.outputs(model, rows, prepared.collate, batch_size(prepared), logits_of):
            labels = torch.tensor([rows[i]["labels"] for i in some], device=logits.device)
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += labels.tolist()
            guessed += logits.argmax(-1).tolist()
        names = prepared.config.classes.names
        self.answered = [(names[a], names[b]) for a, b in zip(right, guessed, strict=True)]
        return {**agreement(right, guessed), "loss": total / len(rows)}

    def tables(self, prepared: Prepared) -> dict[str, dict[str, dict[str, float]]]:
        """Precision, recall and F1 of each class, and which classes are taken for which."""
        names = prepared.config.classes.names
        found = {"Held-out rows by class": by_class(self.answered, names)}
        if len(names) <= MOST_CLASSES:
            wanted, pairs = Counter(right for right, _ in self.answered), Counter(self.answered)
            shares = {a: {b: pairs[a, b] / wanted[a] for b in names if pairs[a, b]} for a in names if wanted[a]}
            found["Share of each class (down) that was taken for a class (across)"] = shares
        return found

    # ---- before and after -------------------------------------------------------------------------------------------
    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Texts with their labels."""
        sources = asked_of(prepared).sources
        return [(_text(sources[i]), sources[i].extra["label"]) for i in asked(prepared)]

    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """The likeliest class and its probability."""
        rows = [asked_of(prepared).rows[i] for i in asked(prepared)]
        found = self._guesses(rows, prepared.config.classes.names, model, prepared.collate)
        return [f"{one['answer']} ({one['probability']:.2f})" for one in found]

    def respond(
        self, config: RunConfig, tokenizer: Any, model: Any, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """``answer``, the class, and its ``probability``."""
        examples = [Example("", text=str(row["text"]), extra={"pair": row.get("text_pair")}) for row in rows]
        names = config.classes.names
        encoded = [{k: v for k, v in row.items() if k != "labels"} for row in _rows(examples, tokenizer, config)[0]]
        return self._guesses(encoded, names, model, encoding.Pad(tokenizer))

    def _guesses(self, rows: list[Any], names: list[str], model: Any, collate: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{}] * len(rows)
        for some, _, logits in encoding.outputs(model, rows, collate, 8, logits_of):
            for i, p in zip(some, logits.softmax(-1), strict=True):
                found[i] = {"answer": names[int(p.argmax())], "probability": float(p.max())}
        return found

    # ---- the plan ---------------------------------------------------------------------------------------------------
    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """The classes with their shares."""
        train: Tokenised = prepared.train
        return [("classes", prepared.renderer.histogram()), ("tokens", f"{train.tokens:,} an epoch")]

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The text, and the class that is learnt."""
        row = prepared.train.rows[0]
        text = spelled(prepared.tokenizer, row["input_ids"], [False] * len(row["input_ids"]))
        return [*text, ("  → ", False), (prepared.config.classes.names[row["labels"]], True)]


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(batch, ..., classes) in float32."""
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()


def label_losses(model: Any, batch: dict[str, Tensor], weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum of -log p over the labels that count, their number); labels (batch,) or (batch, length)."""
    labels = batch["labels"].flatten()
    logits = logits_of(model, batch)
    logits = (
        logits[:, -batch["labels"].shape[1] :] if batch["labels"].dim() == 2 else logits
    )  # virtual tokens come first
    weights = weights.to(logits) if weights is not None else None
    return F.cross_entropy(logits.flatten(0, -2), labels, weights, reduction="sum"), (labels >= 0).sum()


def agreement(right: Sequence[int], guessed: Sequence[int]) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that are right or guessed somewhere."""
    both = [(r, g) for r, g in zip(right, guessed, strict=True)]
    hits = Counter(r for r, g in both if r == g)
    wanted, said = Counter(right), Counter(guessed)
    scores = [2 * hits[one] / (wanted[one] + said[one]) for one in wanted | said]
    return {"accuracy": hits.total() / max(1, len(both)), "f1": sum(scores) / max(1, len(scores))}


def by_class(answered: Sequence[tuple[str, str]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Class -> its precision, recall and F1, for classes that are right or guessed somewhere.

    Args:
        answered: (right, guessed); an empty name stands for no class at all.
        names: in the order to show them.
    """
    hits = Counter(right for right, guessed in answered if right == guessed)
    wanted, said = Counter(right for right, _ in answered), Counter(guessed for _, guessed in answered)
    return {
        name: {
            "precision": hits[name] / max(1, said[name]),
            "recall": hits[name] / max(1, wanted[name]),
            "f1": 2 * hits[name] / (wanted[name] + said[name]),
        }
        for name in names
        if wanted[name] + said[name]
    }


def classes(
    config: RunConfig,
    base: Any,
    train: Iterable[tuple[str, str]],
    held: Iterable[tuple[str, str]],
    notices: list[str],
) -> list[str]:
    """The classes in order, which ``config.classes.names`` then holds: as written there, or those of the data.

    Args:
        config: gets the names.
        base: whose own order stands if it has just these classes.
        train: (where, label) of what is trained on.
        held: of what is measured on.
        notices: classes that cannot be learnt are named here.

    Raises:
        ValueError: a label that ``classes.names`` lacks, or nothing to tell apart.
    """
    train, held = list(train), list(held)
    seen, known = Counter(label for _, label in train), list(config.classes.names)
    if known:
        _refuse_unknown(known, [*train, *held])
    names = known or _ordered({*seen, *(label for _, label in held)}, base)
    if len(seen) < 2:
        raise ValueError(f"All {len(train)} training rows have the class '{next(iter(seen))}': nothing can be learnt.")
    if not known and len(train) >= 20 and len(seen) == len(train):
        raise ValueError(
            f"Each of the {len(train)} training rows has a class of its own, such as '{train[0][1]}'; map the column "
            "that holds the class, for instance  data: {columns: {label: topic}}."
        )
    if missing := [name for name in names if name not in seen]:
        inside = Counter(label for _, label in held)
        words = [f"{name} ({inside[name]:,} held out)" if inside[name] else name for name in missing]
        notices.append(f"No training row has the class {', '.join(words)}: it cannot be learnt.")
    config.classes = config.classes.model_copy(update={"names": names})
    return names


def _ordered(found: set[str], base: Any) -> list[str]:
    own = [str(name) for name in (base.id2label or {}).values()]
    if set(own) == found:
        return own
    return sorted(found, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name))


def _refuse_unknown(names: list[str], labels: list[tuple[str, str]]) -> None:
    wrong = [(where, label) for where, label in labels if label not in names]
    if not wrong:
        return
    where, label = wrong[0]
    near = difflib.get_close_matches(label, names, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(names)}."
    count = f"{len(wrong)} rows have" if len(wrong) > 1 else "1 row has"
    raise ValueError(f"{count} a class that classes.names lacks; the first: {where} has '{label}'{hint}")


def _text(example: Example) -> str:
    pair = example.extra.get("pair")
    return f"{example.text}\n{pair}" if pair else str(example.text)


def _rows(examples: list[Example], tokenizer: Any, config: RunConfig) -> tuple[list[dict[str, Any]], list[int]]:
    texts, pairs = [str(e.text) for e in examples], [e.extra.get("pair") for e in examples]
    both = [str(one) for one in pairs] if any(pairs) else None
    return encoding.encode(tokenizer, texts, both, config.data.max_length)


def _encoded(examples: list[Example], names: list[str], tokenizer: Any, config: RunConfig) -> Tokenised:
    made, number = Tokenised(), {name: i for i, name in enumerate(names)}
    if examples:
        for example, row, length in zip(examples, *_rows(examples, tokenizer, config), strict=True):
            encoding.keep(made, example, {**row, "labels": number[example.extra["label"]]}, length, config)
    return made
