"""The two gradients of a low-rank branch in one reading of its output's equal the two products."""

from __future__ import annotations

import pytest
import torch

from gpu.conftest import TYPES, close
from veneer.ops import lowrank as ops
from veneer.ops.kernels import kernel
from veneer.ops.lowrank import LowRank, fused_linear


@TYPES
@pytest.mark.parametrize(("n", "out", "rank"), [(1, 1, 1), (65, 150, 5), (17, 40, 32), (200, 130, 20)])
def test_both_products(n, out, rank, dtype, device) -> None:
    k = kernel("pair", torch.ones(1, 1, device=device))
    dy, b, h = (torch.randn(s, device=device).to(dtype) for s in ((n, out), (out, rank), (rank, n)))
    for turned in (h, h.t().contiguous().t()):
        dh, db = k.pair(dy, b, turned)
        assert dh.dtype is db.dtype is torch.float32
        assert close(dh, (dy @ b).t(), dtype)
        assert close(db, (h @ dy).t(), dtype)


@TYPES
@pytest.mark.parametrize("rank", [4, ops.PAIRED + 1])
def test_a_layers_gradients_equal_the_eager_ones(rank, dtype, device, monkeypatch) -> None:
    x, w = (torch.randn(s, device=device).to(dtype).requires_grad_(s[0] == 35) for s in ((35, 20), (30, 20)))
    a, b = (torch.randn(s, device=device).requires_grad_() for s in ((rank, 20), (30, rank)))
    grads = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(ops, "kernel", lambda *_: None)
        y = fused_linear(x, w, None, LowRank(a, b, 0.5))
        grads.append(torch.autograd.grad(y.float().square().sum(), (x, a, b)))
    assert all(close(mine, twin, dtype) for mine, twin in zip(*grads, strict=True))
