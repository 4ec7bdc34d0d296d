"""Rows of many adapters in one product equal each adapter alone, forward and gradient."""

from __future__ import annotations

import pytest
import torch

from gpu.conftest import TYPES, close
from veneer.ops.gather import Rows, gathered, gathered_eager

BATCHES = {
    "none": [-1, -1, -1],
    "one row": [1],
    "each another's": [2, 0, 1],
    "some none": [-1, 2, -1, 0, 0, -1, 3],
    "tokens in turn": [0] * 20 + [3] * 10 + [-1] * 10,
}


@TYPES
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_output_and_gradients_equal_the_eager_twins(batch, dtype, device) -> None:
    ranks, inside, out = (3, 17, 8, 1), 70, 33
    rows = Rows.of(batch, ranks, (0.5, 1.0, 2.0, -1.0), device)
    shapes = (len(batch), out), (len(batch), inside), (sum(ranks), inside), (out, sum(ranks))
    tensors = [torch.randn(s, device=device).to(dtype) for s in shapes]
    found = []
    for run in (gathered, gathered_eager):
        y, x, a, b = (t.clone().requires_grad_() for t in tensors)
        answer = run(y * 1, x, a, b, rows)
        found.append([answer, *torch.autograd.grad(answer, (y, x, a, b), tensors[0])])
    assert all(close(mine, twin, dtype) for mine, twin in zip(*found, strict=True))


def test_rows_equal_each_adapter_alone(device) -> None:
    """The eager twin itself, against the formula; and the base's own rows are left to the bit."""
    ranks, scalings, batch = (3, 5), (0.5, 2.0), [1, -1, 0, 1]
    rows = Rows.of(batch, ranks, scalings, device)
    x, a, b = (torch.randn(s, device=device) for s in ((4, 20), (8, 20), (12, 8)))
    y = torch.randn(4, 12, device=device)
    for run in (gathered, gathered_eager):
        answer = run(y.clone(), x, a, b, rows)
        for n, i in enumerate(batch):
            own = slice(0, 3) if i == 0 else slice(3, 8)
            alone = y[n] if i < 0 else y[n] + scalings[i] * b[:, own] @ (a[own] @ x[n])
            assert torch.allclose(answer[n], alone, atol=1e-4)
        assert torch.equal(answer[1], y[1])


def test_factors_may_lie_either_way_round(device) -> None:
    rows = Rows.of([0, 1, 1], (2, 4), (1.0, 1.0), device)
    x, a, b, y = (torch.randn(s, device=device) for s in ((3, 20), (6, 20), (12, 6), (3, 12)))
    turned = gathered(y.clone(), x, a.t().contiguous().t(), b.t().contiguous().t(), rows)
    assert torch.allclose(turned, gathered_eager(y, x, a, b, rows), atol=1e-5)
