"""What the rows of a batch have read before their text: the prompts of each row, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.core.prompt import KeysValues, Prompt
from veneer.engine.adapted import BASE
from veneer.engine.tuner import Tuner


@dataclass
class Before:
    """What the rows of a batch have read before their text.

    Attributes:
        embeds: (batch, E, dim), read as if it were text; or None.
        decoder: (batch, D, dim), the same for the decoder of an encoder-decoder.
        pairs: each layer's keys and values, (batch, heads, C, head_dim); or None.
        mask: (batch, C + E) ones where something stands; rows with shorter prompts begin with zeros.
        uneven: the rows have read different amounts.
    """

    embeds: Tensor | None
    decoder: Tensor | None
    pairs: KeysValues | None
    mask: Tensor
    uneven: bool

    @property
    def embedded(self) -> int:
        return 0 if self.embeds is None else self.embeds.shape[1]

    @property
    def cached(self) -> int:
        return 0 if self.pairs is None else self.pairs[0][0].shape[2]

    @property
    def length(self) -> int:
        """Tokens before the text, padding among them included."""
        return self.mask.shape[1]

    def repeated(self, times: int) -> Before:
        """For beams: each row that often, side by side."""

        def more(x: Tensor | None) -> Tensor | None:
            return None if x is None or times == 1 else x.repeat_interleave(times, 0)

        if times == 1:
            return self
        pairs = None if self.pairs is None else [(more(k), more(v)) for k, v in self.pairs]
        return Before(more(self.embeds), more(self.decoder), pairs, more(self.mask), self.uneven)  # type: ignore


def active(tuner: Tuner, name: str | None = None) -> list[Prompt]:
    """The prompts that are read, in order: of one row's adapter, or of all active adapters."""
    if name is not None:
        return [tuner.prompts[name]] if name in tuner.prompts else []  # type: ignore[list-item]
    return [tuner.prompts[n] for n in tuner.state.active if n in tuner.prompts]  # type: ignore[misc]


def read_before(tuner: Tuner, batch: int, device: torch.device, inputs: dict[str, Any]) -> Before:
    """Collect what ``batch`` rows have read before their text."""
    if tuner.state.route is None:
        parts = [_one(active(tuner), batch, inputs)]
        rows = [torch.arange(batch, device=device)]
    else:
        by_name = tuner.state.rows(batch, device)
        rows = list(by_name.values())
        parts = []
        for name, own in by_name.items():
            some = {k: v[own] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            parts.append(_one([] if name == BASE else active(tuner, name), len(own), some))
    embeds = _stacked([p[0] for p in parts], rows, batch, 1)
    decoder = _stacked([p[1] for p in parts], rows, batch, 1)
    layers = max([0, *(len(p[2]) for p in parts if p[2] is not None)])
    pairs = [
        tuple(_stacked([None if p[2] is None else p[2][i][side] for p in parts], rows, batch, 2) for side in (0, 1))
        for i in range(layers)
    ] or None
    masks = [
        _marks([None if p[2] is None else p[2][0][0] for p in parts], rows, batch, 2, device),
        _marks([p[0] for p in parts], rows, batch, 1, device),
    ]
    lengths = {tuple(0 if x is None else x.shape[d] for x, d in ((p[0], 1), (p[2] and p[2][0][0], 2))) for p in parts}
    return Before(embeds, decoder, pairs, torch.cat(masks, 1), len(lengths) > 1)  # type: ignore[arg-type]


def _one(prompts: list[Prompt], batch: int, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Any]:
    """(embeddings, decoder's embeddings, keys and values) of several prompts read one after the other."""

    def joined(each: list[Any], dim: int) -> Tensor | None:
        found = [x for x in each if x is not None]
        return torch.cat(found, dim) if len(found) > 1 else found[0] if found else None

    embeds = joined([p.embeddings(batch, inputs) for p in prompts], 1)
    decoder = joined([p.decoder_embeddings(batch, inputs) for p in prompts], 1)
    caches = [c for c in (p.keys_values(batch, inputs) for p in prompts) if c is not None]
    pairs = [tuple(joined([layer[i] for layer in layers], 2) for i in (0, 1)) for layers in zip(*caches)]
    return embeds, decoder, pairs or None


def _stacked(each: list[Tensor | None], rows: list[Tensor], batch: int, dim: int) -> Tensor | None:
    """One tensor for the batch out of each group's own, shorter ones with zeros before them."""
    some = [x for x in each if x is not None]
    if not some:
        return None
    if len(each) == 1:
        return some[0]
    longest = max(x.shape[dim] for x in some)
    shape = [batch, *some[0].shape[1:]]
    shape[dim] = longest
    whole = some[0].new_zeros(shape)
    for x, own in zip(each, rows):
        if x is not None:
            pad = (0, 0) * (x.dim() - 1 - dim) + (longest - x.shape[dim], 0)
            whole = whole.index_copy(0, own, F.pad(x, pad).to(whole.dtype))
    return whole


def _marks(each: list[Tensor | None], rows: list[Tensor], batch: int, dim: int, device: torch.device) -> Tensor:
    """(batch, longest): ones where ``_stacked`` has no padding."""
    longest = max([0, *(x.shape[dim] for x in each if x is not None)])
    mask = torch.zeros(batch, longest, dtype=torch.long, device=device)
    for x, own in zip(each, rows):
        if x is not None:
            mask[own, longest - x.shape[dim] :] = 1
    return mask


def everyone(tuner: Tuner) -> list[Prompt]:
    """All prompts that some row of this call reads."""
    if tuner.state.route is None:
        return active(tuner)
    return [p for name in dict.fromkeys(tuner.state.route) for p in active(tuner, name)]
