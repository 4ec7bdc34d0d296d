"""The fused low-rank linear equals its eager twin, forward and gradient; its dropout is one mask, drawn twice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from veneer import LoraConfig
from veneer.engine.tuner import Tuner
from veneer.ops import lowrank as ops
from veneer.ops.lowrank import Layer, LowRank, fused_linear, fused_linears, joined, lowrank


def tensors(dtype=torch.float64, *, batch=(5, 3), wide=7, out=9, r=4):
    torch.manual_seed(0)
    x = torch.randn(*batch, wide, dtype=dtype, requires_grad=True)
    a = torch.randn(r, wide, dtype=dtype, requires_grad=True)
    b = torch.randn(out, r, dtype=dtype, requires_grad=True)
    return x, torch.randn(out, wide, dtype=dtype), torch.randn(out, dtype=dtype), a, b


@pytest.mark.parametrize("batch", [(5,), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_gradients_equal_the_eager_twin(batch, masked: bool) -> None:
    x, w, bias, a, b = tensors(batch=batch)
    rows = x[..., 0].numel()
    mask = torch.randn(rows, 4, dtype=x.dtype) if masked else None

    def fused(x, a, b):
        return fused_linear(x, w, bias, LowRank(a, b, 0.5), mask)

    def eager(x, a, b):
        h = F.linear(x, a)
        h = h if mask is None else h * mask.view(*batch, 4)
        return F.linear(x, w, bias) + 0.5 * F.linear(h, b)

    assert torch.allclose(fused(x, a, b), eager(x, a, b))
    g = torch.randn_like(eager(x, a, b))
    for ours, twin in zip(
        torch.autograd.grad(fused(x, a, b), (x, a, b), g),
        torch.autograd.grad(eager(x, a, b), (x, a, b), g),
        strict=True,
    ):
        assert torch.allclose(ours, twin)
    assert torch.autograd.gradcheck(fused, (x, a, b))
    with torch.no_grad():
        assert torch.allclose(fused(x, a, b), eager(x, a, b))


def test_dropout_draws_one_mask_for_forward_and_backward() -> None:
    x, w, _, a, b = tensors()
    low = LowRank(a, b, 2.0, 0.5)

    def run(x, a, b):
        torch.manual_seed(3)
        return fused_linear(x, w, None, LowRank(a, b, 2.0, 0.5))

    assert not torch.allclose(run(x, a, b), fused_linear(x, w, None, low._replace(dropout=0.0)))
    assert torch.autograd.gradcheck(run, (x, a, b))  # fails if backward's mask were another one


def eager(x, layers: list[Layer], keep: torch.Tensor | None = None, share: float = 1.0) -> list[torch.Tensor]:
    """Each layer by the formula, its parts one by one."""
    seen = x if keep is None else x * keep / share
    ys = []
    for w, bias, low in layers:
        y = F.linear(x, w, bias)
        if low is not None:
            delta = lowrank(seen, low.a, low.b, low.scaling)
            g = 1.0 if low.gain is None else low.gain
            y = y + (g - 1) * F.linear(seen, w) + g * delta
        ys.append(y)
    return ys


def three(x, gains: bool, dropout: float = 0.0) -> tuple[list[Layer], list[torch.Tensor]]:
    """Layers of different widths and ranks, the middle one without a branch, and what trains in them."""
    layers, trained = [], []
    for out, r in ((9, 4), (5, 0), (6, 2)):
        a, b, g = (torch.randn(*s, dtype=x.dtype, requires_grad=True) for s in ((r, 7), (out, r), (out,)))
        low = LowRank(a, b, 0.5 * r, dropout, None, g if gains else None)
        bias = torch.randn(out, dtype=x.dtype) if out != 5 else None
        layers.append(Layer(torch.randn(out, 7, dtype=x.dtype), bias, low if r else None))
        trained += ([a, b, g] if gains else [a, b]) if r else []
    return layers, trained


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (1,)])
def test_layers_that_share_an_input_equal_the_eager_ones(gains, dropout, used, monkeypatch) -> None:
    x = tensors()[0]
    layers, trained = three(x, gains, dropout)
    keep = torch.randint(0, 2, (15, 7), dtype=torch.uint8)
    monkeypatch.setattr(ops, "dropped", lambda x, p: ops.Dropped(x * keep, keep, 0.6))
    ours = fused_linears(x, layers)
    twins = eager(x, layers, keep.view_as(x) if dropout else None, 0.6)
    assert all(torch.allclose(y, twin) for y, twin in zip(ours, twins, strict=True))
    with torch.no_grad():
        assert all(torch.allclose(y, twin) for y, twin in zip(fused_linears(x, layers), twins, strict=True))
    both = [
        torch.autograd.grad(sum((i + 1) * ys[i].square().sum() for i in used), (x, *trained), allow_unused=True)
        for ys in (ours, twins)
    ]
    assert [g is None for g in both[0]] == [g is None for g in both[1]]
    assert all(torch.allclose(mine, twin) for mine, twin in zip(*both, strict=True) if mine is not None)
    if used == (0, 1, 2):
        assert torch.autograd.gradcheck(lambda x, *_: fused_linears(x, layers), (x, *trained))


def test_a_gain_keeps_its_precision_in_a_half_precision_layer() -> None:
    torch.manual_seed(0)
    x, w, a = torch.randn(256, 64), torch.randn(32, 64), torch.randn(4, 64)
    b, g = torch.randn(32, 4, requires_grad=True), torch.rand(32).add_(0.5).requires_grad_()
    half = fused_linear(x.bfloat16().requires_grad_(), w.bfloat16(), None, LowRank(a, b, 0.5, gain=g))
    half.float().square().mean().backward()
    grads = [b.grad, g.grad]
    (exact,) = eager(x, [Layer(w, None, LowRank(a, b, 0.5, gain=g))])
    twins = torch.autograd.grad(exact.square().mean(), (b, g))
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() < 0.02 * exact.abs().max()
    assert all((mine - twin).norm() < 0.01 * twin.norm() for mine, twin in zip(grads, twins, strict=True))


def test_dropout_is_unbiased_at_the_rounded_probability() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 4000, dtype=torch.float64)
    a, w = torch.ones(1, 4000, dtype=torch.float64, requires_grad=True), torch.zeros(1, 4000, dtype=torch.float64)
    b = torch.ones(1, 1, dtype=torch.float64)
    sums = torch.cat([fused_linear(x, w, None, LowRank(a, b, 1.0, 0.1)).detach() for _ in range(50)])
    assert abs(float(sums.mean()) / 4000 - 1) < 0.005
    kept = sums / (256 / 230) / 4000  # 0.1 is 26 of 256
    assert abs(float(kept.mean()) - 230 / 256) < 0.005


def test_frozen_factors_get_no_gradient_and_cost_none() -> None:
    x, w, _, a, b = tensors()
    a.requires_grad_(False)
    fused_linear(x, w, None, LowRank(a, b, 1.0)).sum().backward()
    assert a.grad is None and b.grad is not None and x.grad is not None


def test_half_precision_layers_take_float32_factors() -> None:
    x, w, bias, a, b = tensors(torch.float32, wide=64, out=32)
    half = x.detach().bfloat16().requires_grad_()
    y = fused_linear(half, w.bfloat16(), bias.bfloat16(), LowRank(a, b, 0.5))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and a.grad.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    grads = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    exact = F.linear(half.detach().float(), w, bias) + lowrank(half.detach().float(), a, b, 0.5)
    exact.square().mean().backward()
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()
    for ours, twin in zip(grads, (a.grad, b.grad), strict=True):
        assert (ours - twin).norm() < 0.02 * twin.norm()


def test_joined_branches_are_the_sum() -> None:
    x, w, _, a, b = tensors()
    a2, b2 = torch.randn(2, 7, dtype=x.dtype), torch.randn(9, 2, dtype=x.dtype)
    mask = torch.tensor([[0.5] * 4 + [3.0] * 2], dtype=x.dtype)
    y = fused_linear(x, w, None, joined([LowRank(a, b, 0.5), LowRank(a2, b2, 3.0)]), mask)
    assert torch.allclose(y, F.linear(x, w) + lowrank(x, a, b, 0.5) + lowrank(x, a2, b2, 3.0))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 6)

    def forward(self, x):
        return self.layer(x)


def adapted(**options) -> Tuner:
    tuner = Tuner(Net())
    for name, r in (("a", 2), ("b", 3)):
        tuner.add(name, LoraConfig(**({"r": r, "target_modules": ["layer"], "init_lora_weights": False} | options)))
    tuner.set_active("a")
    return tuner


@pytest.mark.parametrize("setting", ["one", "both", "mixed"])
def test_the_short_way_is_taken_and_equals_the_long_one(setting: str) -> None:
    tuner = adapted()
    host = tuner.hosts()[0]
    x = torch.randn(4, 3, 8)
    if setting == "both":
        tuner.set_active("a", "b")
    if setting == "mixed":
        tuner.route(["a", "b", "__base__", "b"])

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        tuner.zero_grad()
        y = tuner(x)
        y.square().sum().backward()
        return y, [p.grad.clone() for p in tuner.parameters() if p.grad is not None]

    short, short_grads = run()
    assert host._path is not None and host._path(x) is not None
    host._path = None
    long, long_grads = run()
    assert torch.allclose(short, long, atol=1e-6)
    assert len(short_grads) == len(long_grads) and all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(short_grads, long_grads, strict=True)
    )


def test_hooks_gains_and_trainable_bases_take_the_long_way() -> None:
    x = torch.randn(4, 8)
    seen = []
    tuner = adapted()
    y = tuner(x)
    handle = tuner.model.layer.base_layer.register_forward_hook(lambda m, a, out: seen.append(out))
    assert torch.allclose(tuner(x), y, atol=1e-6) and len(seen) == 1
    handle.remove()
    tuner.state.gains = {"a": 0.0}
    with tuner.disabled():
        base = tuner(x)
    assert torch.allclose(tuner(x), base, atol=1e-6)
    tuner.state.gains = {}
    tuner.model.layer.base_layer.weight.requires_grad_(True)
    tuner(x).sum().backward()
    assert tuner.model.layer.base_layer.weight.grad is not None


def test_autocast_keeps_its_output_dtype() -> None:
    tuner, x = adapted(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = tuner(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tuner.parameters() if p.requires_grad)


def test_new_values_are_seen_at_once() -> None:
    tuner, x = adapted(), torch.randn(4, 8)
    tuner.set_active("a", "b")
    y = tuner.eval()(x)
    with torch.no_grad():
        tuner.hosts()[0].adapters["b"].lora_B.weight.data.mul_(2)
    assert not torch.allclose(tuner(x), y)
    twin = copy.deepcopy(tuner)
    twin.set_active("b")
    assert not torch.allclose(twin(x), tuner(x))
