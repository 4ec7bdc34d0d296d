"""The gated block in one function equals its layers one by one, forward and gradient; its middle is not kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ops.test_lowrank import eager
from veneer.ops import lowrank as ops
from veneer.ops.gated import gated
from veneer.ops.lowrank import Layer, LowRank


def block(gains: bool, dropout: float = 0.0, branches=(True, True, True)):
    torch.manual_seed(0)
    x, layers, trained = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True), [], []
    for (out, wide), has in zip(((6, 7), (6, 7), (4, 6)), branches, strict=True):
        a, b, g = (torch.randn(*s, dtype=x.dtype, requires_grad=True) for s in ((2, wide), (out, 2), (out,)))
        low = LowRank(a, b, 0.5, dropout, None, g if gains else None)
        bias = torch.randn(out, dtype=x.dtype) if out == 4 else None
        layers.append(Layer(torch.randn(out, wide, dtype=x.dtype), bias, low if has else None))
        trained += ([a, b, g] if gains else [a, b]) if has else []
    return x, layers, trained


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "branches", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_forward_and_gradients_equal_the_layers_one_by_one(gains, dropout, branches, monkeypatch) -> None:
    x, layers, trained = block(gains, dropout, branches)
    keeps = {wide: torch.randint(0, 2, (15, wide), dtype=torch.uint8) for wide in (6, 7)}

    def dropped(x: torch.Tensor, p: float) -> ops.Dropped:
        return ops.Dropped(x * keeps[x.shape[1]], keeps[x.shape[1]], 0.6)

    monkeypatch.setattr(ops, "dropped", dropped)
    keep = {wide: k.view(3, 5, wide) if dropout else None for wide, k in keeps.items()}
    gate, up = eager(x, layers[:2], keep[7], 0.6)
    (twin,) = eager(F.silu(gate) * up, layers[2:], keep[6], 0.6)
    y = gated(x, *layers, F.silu)
    assert torch.allclose(y, twin)
    both = (torch.autograd.grad(t.square().sum(), (x, *trained)) for t in (y, twin))
    assert all(torch.allclose(mine, other) for mine, other in zip(*both, strict=True))
    assert torch.autograd.gradcheck(lambda x, *_: gated(x, *layers, F.silu), (x, *trained))


def test_two_of_the_five_wide_tensors_are_kept() -> None:
    x, layers, _ = block(False)
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = gated(x, *layers, torch.tanh)
    y.sum().backward()
    assert sum(t.shape == (15, 6) for t in kept.values()) == 2


def test_a_frozen_input_and_frozen_outer_layers_cost_nothing() -> None:
    x, layers, trained = block(False)
    for t in trained[:4]:
        t.requires_grad_(False)
    gated(x.detach(), *layers, F.silu).sum().backward()
    assert all(t.grad is None for t in trained[:4]) and all(t.grad is not None for t in trained[4:])
