"""For a machine with an NVIDIA GPU: ``pytest tests/gpu``. Elsewhere ``tests/ops/test_triton.py`` runs the kernels'.

That is in a process of its own, in Triton's interpreter, which has to be chosen before triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from veneer.ops import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def device(monkeypatch) -> Iterator[torch.device]:
    """A device whose tensors the kernels take."""
    device = torch.device("cpu" if INTERPRETED else "cuda", None if INTERPRETED else 0)
    monkeypatch.setattr(kernels, "DEVICES", {device.type})
    monkeypatch.setattr(kernels, "_found", {})
    torch.manual_seed(0)
    yield device
    kernels.switch("all")


TYPES = pytest.mark.parametrize(
    "dtype", list(kernels.TOLERANCE) if not INTERPRETED else [torch.float32, torch.bfloat16]
)


def close(found: torch.Tensor, twin: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two results agree as far as the kernels' own check asks."""
    return found.shape == twin.shape and kernels.apart(found, twin) <= kernels.TOLERANCE[dtype]
