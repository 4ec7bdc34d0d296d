"""Factors of a grouped convolution: one block of input channels a group, against the same factor over all channels."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(a: Tensor, groups: int) -> Tensor:
    """(r, in/groups, *kernel) of a grouped convolution -> (r, in, *kernel) of a plain one, zero outside each group."""
    r, width = a.shape[:2]
    blocks = a.reshape(groups, r // groups, width, *a.shape[2:])
    out = blocks.new_zeros(groups, r // groups, groups, width, *a.shape[2:])
    for g in range(groups):
        out[g, :, g] = blocks[g]
    return out.reshape(r, groups * width, *a.shape[2:])


def gather(a: Tensor, groups: int) -> Tensor | None:
    """The inverse of ``spread``; None where an entry outside the groups is not zero."""
    r, width = a.shape[0], a.shape[1] // groups
    blocks = a.reshape(groups, r // groups, groups, width, *a.shape[2:])
    out = torch.stack([blocks[g, :, g] for g in range(groups)]).reshape(r, width, *a.shape[2:])
    return out if torch.equal(spread(out, groups), a) else None
