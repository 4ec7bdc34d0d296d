"""Embeddings: texts that belong together get vectors that lie together.

In-batch negatives (multiple negatives ranking, Henderson et al. 2017, arXiv:1705.00652): of all the texts in a batch
each anchor has to find its own,

    loss_i = -log  exp(cos(a_i, p_i) / t) / sum_j exp(cos(a_i, p_j) / t),   j over positives and given negatives

and texts of the batch that are the same as p_i do not count as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.train import encoding
from veneer.train.config import RunConfig
from veneer.train.data import Example
from veneer.train.sft import fits
from veneer.train.tasks import LOSS, Features, Losses, Material, Metric, Task, asked, asked_of, batch_size, spelled
from veneer.train.tokens import Tokenised
from veneer.train.trainer import held_out_loss

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared

PARTS = ("input_ids", "positive_input_ids", "negative_input_ids")


class Together(encoding.Pad):
    """Anchors, positives and negatives of the rows as one batch of texts, in that order."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (texts, length); ``labels`` (rows,): where each anchor's positive is."""
        texts = [{"input_ids": row[part]} for part in PARTS for row in rows if row.get(part)]
        return {**super().__call__(texts), "labels": torch.arange(len(rows))}


class Embeddings(Task):
    """Learns from pairs, and from triplets with a text that does not belong."""

    adapter_type = "FEATURE_EXTRACTION"
    auto = "AutoModel"
    formats = ("pairs",)
    metrics = (Metric("accuracy", True), Metric("mrr", True), LOSS)
    prompts = "texts"

    def features(self, material: Material) -> Features:
        """Ids of anchors, positives and negatives."""
        config, tokenizer = material.config, material.tokenizer
        if config.train.batch_size < 2:
            raise ValueError(
                "train.batch_size is 1: an embedding learns from the other texts of its batch; take 8 or more."
            )
        _leave_pooler(material)
        encoding.limit(config, material.base, tokenizer, material.adapter)
        made = Features(_encoded(material.rows, tokenizer, config), _encoded(material.held, tokenizer, config))
        made.collate = Together(tokenizer)
        material.notices += encoding.notices(made.train, config)
        fits(made.train, material.base, config)
        return made

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """-log p of each anchor's positive among the texts of the batch."""
        options = prepared.config.embeddings
        return partial(pair_losses, pooling=options.pooling, temperature=options.temperature)

    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """Of all held-out texts: is the nearest one the anchor's own (accuracy), at which place does it come (mrr)."""
        rows = prepared.held.rows
        anchors, texts, own = _library(prepared, model, rows)
        near = anchors @ texts.T
        mine = near[torch.arange(len(rows)), own]
        places = (near > mine[:, None]).sum(1) + 1
        loss = held_out_loss(model, rows, prepared.collate, batch_size(prepared), self.losses(prepared, model))
        found = {"accuracy": (places == 1).float().mean().item(), "mrr": (1 / places).mean().item()}
        return {**found, "loss": loss}

    # ---- before and after -------------------------------------------------------------------------------------------
    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Anchors with their own texts."""
        sources = asked_of(prepared).sources
        return [(str(sources[i].text), sources[i].extra["positive"]) for i in asked(prepared)]

    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """The nearest of the texts that are looked at, with its cosine."""
        if not (chosen := asked(prepared)):
            return []
        source = asked_of(prepared)
        some = sorted({*chosen, *range(min(len(source), 200))})
        anchors, texts, own = _library(prepared, model, [source.rows[i] for i in some])
        spoken = {int(place): source.sources[i].extra["positive"] for i, place in zip(some, own, strict=True)}
        near = anchors @ texts.T
        near[:, [place for place in range(len(texts)) if place not in spoken]] = -2.0  # negatives are not shown
        best = [near[some.index(i)].max(0) for i in chosen]
        return [f"{spoken[int(one.indices)]} ({float(one.values):.2f})" for one in best]

    def respond(
        self, config: RunConfig, tokenizer: Any, model: Any, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """``answer``, the text's vector of length 1."""
        texts = [str(row["text"]) for row in rows]
        encoded, _ = encoding.encode(tokenizer, texts, None, config.data.max_length)
        ids = [row["input_ids"] for row in encoded]
        return [{"answer": one.tolist()} for one in _vectors(ids, model, encoding.Pad(tokenizer), config, 8)]

    # ---- the plan ---------------------------------------------------------------------------------------------------
    def inputs(self, prepared: Prepared, model: Any) -> dict[str, Any]:
        """Anchors, positives and negatives of the largest batch together."""
        rows = min(prepared.config.train.batch_size, len(prepared.feed))
        length = max(len(row[part]) for row in prepared.feed for part in PARTS if part in row)
        texts = rows * (3 if any(PARTS[2] in row for row in prepared.feed) else 2)
        return {key: torch.ones(texts, length, dtype=torch.long) for key in ("input_ids", "attention_mask")}

    def output(self, output: Any) -> Tensor:
        """Hidden states: (tokens, hidden)."""
        return output.last_hidden_state.flatten(0, -2)

    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """How many pairs and triplets there are."""
        rows, options = prepared.train.rows, prepared.config.embeddings
        triplets = sum(PARTS[2] in row for row in rows)
        each = prepared.config.train.batch_size
        return [
            (
                "pairs",
                f"{len(rows) - triplets:,} pairs and {triplets:,} triplets; {each} anchors tell their texts apart",
            ),
            ("vectors", f"pooling {options.pooling}, temperature {options.temperature:g}"),
        ]

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The first anchor and its positive."""
        row, tokenizer = prepared.train.rows[0], prepared.tokenizer
        anchor = spelled(tokenizer, row[PARTS[0]], [False] * len(row[PARTS[0]]))
        return [*anchor, ("  ↔  ", False), *spelled(tokenizer, row[PARTS[1]], [True] * len(row[PARTS[1]]))]


def _leave_pooler(material: Material) -> None:
    """Keep "all-linear" from the layer behind an encoder's first token, which our vectors do not pass through."""
    adapter, block = material.adapter, material.config.adapter
    everywhere = getattr(adapter, "target_modules", None) == "all-linear" and "start" not in block
    if everywhere and not getattr(adapter, "exclude_modules", True):
        material.config.adapter = {**block, "exclude_modules": ["pooler.dense"]}


def pool(hidden: Tensor, mask: Tensor, how: str = "mean") -> Tensor:
    """One vector of length 1 for each text.

    Args:
        hidden: (texts, length, hidden); virtual tokens before the text are left out.
        mask: (texts, length), 1 at tokens, padded on the right.
        how: ``mean`` of the tokens, the ``first`` or the ``last``.

    Returns:
        (texts, hidden), float32.
    """
    hidden = hidden[:, -mask.shape[1] :].float()
    if how == "first":
        vectors = hidden[:, 0]
    elif how == "last":
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    else:
        vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(vectors, dim=-1)


def pair_losses(model: Any, batch: dict[str, Tensor], pooling: str, temperature: float) -> tuple[Tensor, Tensor]:
    """(sum of the anchors' losses, their number)."""
    vectors = _embed(model, batch, pooling)
    labels, ids = batch["labels"], batch["input_ids"]
    anchors, texts = vectors[: len(labels)], vectors[len(labels) :]
    same = (ids[len(labels) :][:, None] == ids[len(labels) :][None]).all(-1)[: len(labels)]  # (rows, texts)
    same[torch.arange(len(labels)), labels] = False
    scores = (anchors @ texts.T / temperature).masked_fill(same, float("-inf"))
    return F.cross_entropy(scores, labels, reduction="sum"), torch.tensor(len(labels), device=labels.device)


def _embed(model: Any, batch: dict[str, Tensor], pooling: str) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return pool(model(**inputs).last_hidden_state, batch["attention_mask"], pooling)


def _vectors(ids: Sequence[list[int]], model: Any, pad: Any, config: RunConfig, batch: int) -> list[Tensor]:
    call = partial(_embed, pooling=config.embeddings.pooling)
    found: list[Any] = [None] * len(ids)
    for some, _, vectors in encoding.outputs(model, [{"input_ids": one} for one in ids], pad, batch, call):
        for i, vector in zip(some, vectors, strict=True):
            found[i] = vector.cpu()
    return found


def _library(prepared: Prepared, model: Any, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """(anchors, all different positives and negatives, the number of each anchor's own among them)."""
    numbers: dict[tuple[int, ...], int] = {}
    for part in PARTS[1:]:
        for row in rows:
            if part in row:
                numbers.setdefault(tuple(row[part]), len(numbers))
    pad, config = encoding.Pad(prepared.tokenizer), prepared.config
    texts = [[*map(int, one)] for one in numbers]
    found = [
        torch.stack(_vectors(ids, model, pad, config, batch_size(prepared)))
        for ids in ([row[PARTS[0]] for row in rows], texts)
    ]
    return found[0], found[1], torch.tensor([numbers[tuple(row[PARTS[1]])] for row in rows])


def _encoded(examples: list[Example], tokenizer: Any, config: RunConfig) -> Tokenised:
    made = Tokenised()
    for example in examples:
        texts = [str(example.text), example.extra["positive"], example.extra.get("negative")]
        found, lengths = encoding.encode(tokenizer, [one for one in texts if one], None, config.data.max_length)
        row = {part: one["input_ids"] for part, one in zip(PARTS, found, strict=False)}
        encoding.keep(made, example, row, max(lengths), config)
    return made
