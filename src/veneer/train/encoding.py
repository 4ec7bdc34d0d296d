"""Texts as rows of ids for tasks without a template: lengths that the model can take, padding, predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.train.config import RunConfig
from veneer.train.data import Example
from veneer.train.evaluate import pad_token
from veneer.train.tokens import IGNORED, Tokenised

Row = dict[str, Any]

# Families whose first position number is the padding's plus one, so that two of their positions are never used.
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}


class Pad:
    """Rows to a right-padded batch: a list becomes a column as long as its longest, a number stays one a row.

    Args:
        tokenizer: whose padding token fills up ids.
    """

    def __init__(self, tokenizer: Any):
        self.pad = pad_token(tokenizer)

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        """The rows' columns, and an ``attention_mask`` (batch, length) for ``input_ids``."""
        batch = {}
        for name, first in rows[0].items():
            values = [row[name] for row in rows]
            batch[name] = self._column(name, values) if isinstance(first, list) else torch.tensor(values)
        batch["attention_mask"] = lengths_mask([row["input_ids"] for row in rows])
        return batch

    def _column(self, name: str, values: list[list[int]]) -> Tensor:
        filler = self.pad if name.endswith("input_ids") else IGNORED if name == "labels" else 0
        length = max(map(len, values))
        return torch.tensor([one + [filler] * (length - len(one)) for one in values])

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """How many tokens a batch holds, for the speed that is shown."""
        return int(batch["attention_mask"].sum())


def lengths_mask(values: Sequence[Sequence[int]]) -> Tensor:
    """(batch, length): 1 where a row has a token."""
    lengths = torch.tensor([[len(one)] for one in values])
    return (torch.arange(int(lengths.max())) < lengths).long()


def limit(config: RunConfig, base: Any, tokenizer: Any, adapter: Any) -> int:
    """``data.max_length``, or what the model has positions for if that is less; the settings are told."""
    places = getattr(base, "max_position_embeddings", None)
    if places:
        places -= 2 if base.model_type in OFFSET_POSITIONS else 0
        places = min(places, tokenizer.model_max_length)
        places -= getattr(adapter, "num_virtual_tokens", None) or 0
        config.data = config.data.model_copy(update={"max_length": min(config.data.max_length, places)})
    return config.data.max_length


def encode(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, longest: int, offsets: bool = False
) -> tuple[list[Row], list[int]]:
    """(columns of each text, its length before it was cut), with the tokenizer's own special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        texts: one a row.
        pairs: a second text for each row, or None.
        longest: longer rows are cut to it, their end token kept.
        offsets: whether rows get ``offsets``, the characters each token stands for.
    """
    second = (list(pairs),) if pairs is not None else ()
    whole = tokenizer(list(texts), *second, truncation=False, verbose=False)["input_ids"]
    found = tokenizer(
        list(texts), *second, truncation=True, max_length=longest, return_offsets_mapping=offsets, verbose=False
    )
    columns = ["input_ids"] + (["token_type_ids"] if pairs is not None and "token_type_ids" in found else [])
    rows: list[Row] = [{name: list(found[name][i]) for name in columns} for i in range(len(texts))]
    if offsets:
        for row, spans in zip(rows, found["offset_mapping"], strict=True):
            row["offsets"] = spans
    return rows, [len(ids) for ids in whole]


def keep(made: Tokenised, example: Example, row: Row, length: int, config: RunConfig) -> bool:
    """Enter a row, unless it is too long and such rows are dropped; whether it was entered."""
    made.lengths.append(length)
    if length > config.data.max_length:
        drop = config.data.too_long == "drop"
        made.counts["dropped_long" if drop else "truncated"] += 1
        if drop:
            return False
    made.rows.append(row)
    made.sources.append(example)
    return True


def notices(train: Tokenised, config: RunConfig) -> list[str]:
    """What became of rows that are too long."""
    words = {"dropped_long": "were dropped", "truncated": "were cut"}
    return [
        f"{train.counts[key]} of {len(train.lengths)} rows are longer than data.max_length {config.data.max_length} "
        f"and {what}."
        for key, what in words.items()
        if train.counts[key]
    ]


@torch.no_grad()
def outputs(
    model: nn.Module, rows: list[Row], collate: Any, batch_size: int, call: Any
) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
    """(the rows' numbers, their batch, ``call(model, batch)``), alike lengths together, in evaluation mode."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        batch = {name: value.to(device) for name, value in collate([rows[i] for i in some]).items()}
        yield some, batch, call(model, batch)
    model.train(training)
