"""Packing: several rows in one, none of which sees another.

Rows are laid into bins of ``max_length``, longest first, each into the fullest bin that still has room. Inside a bin
the positions start anew with every row and attention is allowed within a row only, by a mask that every attention
implementation understands; so a packed row's losses are those of its rows alone.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch import Tensor

Row = dict[str, list[int]]


def pack(rows: list[Row], max_length: int) -> list[Row]:
    """Rows in bins: ``input_ids``, ``labels`` and ``segments``, the number of the row a token is from (from 1).

    Args:
        rows: tokenised rows, none longer than ``max_length``, none of whose first labels is learnt.
        max_length: the size of a bin.
    """
    bins: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # (space left, bin), sorted
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = max_length, len(bins)
            bins.append([])
        bins[number].append(row)
        bisect.insort(room, (left - length, number))
    return [
        {
            "input_ids": [token for row in one for token in row["input_ids"]],
            "labels": [label for row in one for label in row["labels"]],
            "segments": [number for number, row in enumerate(one, 1) for _ in row["input_ids"]],
        }
        for one in bins
    ]


def positions(segments: Tensor) -> Tensor:
    """0, 1, 2, ... anew in every segment.

    Args:
        segments: (batch, length), 0 where padded.
    """
    index = torch.arange(segments.shape[1]).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values


def block_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, 1, length, length) to add to the scores: 0 for earlier tokens of the same segment, else very small."""
    same = segments[:, None, :] == segments[:, :, None]
    allowed = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def check(adapter: Any) -> None:
    """Packing has one place for a prompt and many rows that need it.

    Raises:
        ValueError: the adapter is a prompt or a prefix.
    """
    if adapter.is_prompt_learning:
        raise ValueError(f"data.packing cannot be used with {adapter.peft_type}: a packed row has only one beginning.")
