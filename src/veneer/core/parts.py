"""Tensors that lie in parts on several processes (DTensors): FSDP2's and those of tensor-parallel plans."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_cut(value: Any) -> bool:
    """Whether a tensor is a DTensor; asks without importing what has never been imported."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def whole(value: Tensor) -> Tensor:
    """A DTensor's full value, on every process of its mesh; another tensor is returned as it is."""
    return value.full_tensor() if is_cut(value) else value  # type: ignore[attr-defined]


def parts_of(live: Tensor, value: Tensor) -> Tensor:
    """``value`` (global shape) cut up as ``live`` is; process 0's values count. As it is, where ``live`` is not cut."""
    if not is_cut(live) or is_cut(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # A memory-mapped value is read here, and the dtype is the live one's, so that all ranks exchange the same bytes.
    value = value.detach().to(live.dtype).contiguous()
    return distribute_tensor(value, live.device_mesh, live.placements)  # type: ignore[attr-defined]
