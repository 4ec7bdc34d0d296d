"""Low-rank branches of many adapters over one batch, each row with its own (Punica, arXiv:2310.18547).

    y_n += s_i B_i A_i x_n,   i = the adapter of row n

The factors of all adapters lie side by side. The eager twin multiplies every row by all of them and keeps what is its
own; the kernels read, for some rows in turn, the factors of those rows' adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.kernels import kernel


class Rows(NamedTuple):
    """Whose each row is, and where each adapter's factors lie among those of all."""

    index: Tensor
    """(N,) int32: the adapter of each row, -1 where it has none."""
    starts: Tensor
    """(adapters + 1,) int32: the first rank of each, and the number of all."""
    scalings: Tensor
    """(adapters,) float32."""
    most: int
    """The largest rank."""

    @classmethod
    def of(cls, index: Sequence[int], ranks: Sequence[int], scalings: Sequence[float], device: torch.device) -> Rows:
        """From plain numbers."""
        starts = torch.tensor([0, *ranks]).cumsum(0)
        return cls(
            torch.tensor(index, dtype=torch.int32, device=device), starts.to(device, torch.int32),
            torch.tensor(scalings, dtype=torch.float32, device=device), max(ranks),
        )  # fmt: skip

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(N, total rank): the scaling where a rank is the row's own, else 0."""
        ranks = self.starts.diff()
        owner = torch.arange(len(ranks), device=ranks.device).repeat_interleave(ranks)
        return ((self.index[:, None] == owner) * self.scalings.repeat_interleave(ranks)).to(dtype)


def gathered(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """``y`` plus each row's own branch; where a kernel runs, added in place.

    Args:
        y: (N, out), contiguous.
        x: (N, in), in y's dtype, as are the factors.
        a: (total rank, in).
        b: (out, total rank).
        rows: whose each row is.

    Returns:
        (N, out)
    """
    found = kernel("gather", y, x)
    return gathered_eager(y, x, a, b, rows) if found is None else found.gathered(y, x, a, b, rows)


def gathered_eager(y: Tensor, x: Tensor, a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """The eager twin."""
    return torch.addmm(y, (x @ a.t()) * rows.mask(x.dtype), b.t())
