"""Rows of many adapters in one product equal each adapter alone, forward and gradient."""

from __future__ import annotations

import pytest
import torch

from gpu.conftest import TYPES, close
from veneer import LoraConfig
from veneer.engine.tuner import Tuner
from veneer.ops.gather import Rows, gathered, gathered_eager
from veneer.ops.kernels import kernel

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


@pytest.mark.parametrize("trains", [False, True])
def test_a_mixed_batch_of_many_adapters_equals_each_alone(trains, device, monkeypatch) -> None:
    """Through the engine, with beams, tokens, adapters that lie at one layer only, and rows of none."""
    net = torch.nn.Sequential(torch.nn.Linear(20, 24), torch.nn.Tanh(), torch.nn.Linear(24, 10)).to(device)
    tuner, names = Tuner(net), list("abcdef")
    for r, name in enumerate(names, 2):
        layers = ["0"] if name == "c" else ["0", "2"]
        tuner.add(name, LoraConfig(r=r, lora_alpha=3, target_modules=layers, init_lora_weights=False))
    route, ran = ["f", "__base__", "c", "a", "e", "a", "b", "d"], []
    shrink = kernel("gather", torch.ones(1, device=device)).shrink
    monkeypatch.setattr(
        kernel("gather", torch.ones(1, device=device)), "shrink", lambda *g: ran.append(1) or shrink(*g)
    )
    x = torch.randn(2 * len(route), 3, 20, device=device)
    weights = [p for name in names for _, adapter in tuner.adapters(name) for p in adapter.parameters()]
    for p in weights:
        p.requires_grad_()
    with torch.set_grad_enabled(trains):
        tuner.route(route)
        for _ in range(2):  # the first call without gradients prepares the second
            y = tuner(x)
        tuner.route(None)
        assert ran
        alone = []
        for i, name in enumerate(n for n in route for _ in range(2)):
            tuner.set_active(*([] if name == "__base__" else [name]))
            alone.append(tuner(x[i : i + 1]))
        twin = torch.cat(alone)
    assert torch.allclose(y, twin, atol=1e-4)
    if trains:
        for p in weights:
            p.requires_grad_()
        grads = [torch.autograd.grad(t.square().sum(), weights, retain_graph=True) for t in (y, twin)]
        assert all(close(mine, other, torch.float32) for mine, other in zip(*grads, strict=True))
