"""A dropped low-rank branch whose mask is drawn anew: one mask in all kernels, with dropout's statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpu.conftest import TYPES, close
from veneer.ops import lowrank as ops
from veneer.ops.gated import gated
from veneer.ops.kernels import kernel
from veneer.ops.lowrank import Layer, LowRank, fused_linears

SHAPES = [(1, 1, 1), (65, 70, 3), (33, 70, 130), (90, 17, 16)]


@TYPES
@pytest.mark.parametrize(("n", "wide", "rank"), SHAPES)
def test_each_product_equals_the_one_with_the_mask(n, wide, rank, dtype, device) -> None:
    k = kernel("dropout", torch.ones(1, 1, device=device))
    x, a, dh = (torch.randn(s, device=device).to(dtype) for s in ((n, wide), (rank, wide), (n, rank)))
    seed = k.draw(device)
    m = k.mask(x, seed, 100)
    assert set(m.unique().tolist()) <= {0.0, 1.0}
    assert close(k.inner(x, a, seed, 100), (m * x) @ a.t(), dtype)
    for turned in (dh.t(), dh.t().contiguous()):  # the ranks last, and first
        assert close(k.outer(x, turned, seed, 100), turned @ (m * x), dtype)
        dx = torch.randn_like(x)
        assert close(k.spread(dx.clone(), turned, a, seed, 100), dx + m * (dh @ a), dtype)


def test_factors_may_be_wider_than_the_input(device) -> None:
    k = kernel("dropout", torch.ones(1, 1, device=device))
    x, a, seed = torch.randn(20, 40, device=device).bfloat16(), torch.randn(4, 40, device=device), k.draw(device)
    m = k.mask(x, seed, 100)
    assert close(k.inner(x, a, seed, 100), (m * x).float() @ a.t(), torch.bfloat16)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_has_dropouts_statistics(p, device) -> None:
    k, cut = kernel("dropout", torch.ones(1, 1, device=device)), round(256 * p)
    x, share = torch.ones(128, 128, device=device), 1 - cut / 256
    one, again, other = (k.mask(x, torch.tensor([seed], device=device), cut) for seed in (7, 7, 8))
    assert torch.equal(one, again)
    sd = (share * (1 - share)) ** 0.5
    assert abs(one.mean().item() - share) < 5 * sd / 128
    for mean in (one.mean(0), one.mean(1)):  # no row and no column that is kept or dropped as a whole
        assert (mean - share).abs().max().item() < 6 * sd / 128**0.5
    neighbours = [one[:, :-1] * one[:, 1:], one[:-1] * one[1:], one * other]
    assert all(abs(both.mean().item() - share**2) < 0.03 for both in neighbours)


def test_large_seeds_differ_from_one_another(device) -> None:
    k, x = kernel("dropout", torch.ones(1, 1, device=device)), torch.ones(32, 32, device=device)
    masks = [k.mask(x, torch.tensor([seed], device=device), 128) for seed in (1, 2**32 + 1, 2**62 - 1)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def layers(device, dtype=torch.float32) -> tuple[torch.Tensor, list[Layer], list[torch.Tensor]]:
    """Three layers, two that read x (20) and one from their width (24) back, and all that trains."""
    x = torch.randn(3, 7, 20, device=device).to(dtype).requires_grad_()
    built, trained = [], [x]
    for out, wide, r in ((24, 20, 4), (24, 20, 3), (20, 24, 40)):
        a, b = ((0.3 * torch.randn(s, device=device)).requires_grad_() for s in ((r, wide), (out, r)))
        weight, bias = (0.3 * torch.randn(s, device=device).to(dtype) for s in ((out, wide), (out,)))
        built.append(Layer(weight, bias, LowRank(a, b, 0.5, 0.4)))
        trained += [a, b]
    return x, built, trained


def both(device, dtype, monkeypatch, run) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients: with kernels, and eager under the very masks that the kernels drew."""
    x, built, trained = layers(device, dtype)
    k, drawn = kernel("dropout", x.new_ones(1, 1)), []
    draw = k.draw

    def found(y):
        return [
            y,
            *[g for g in torch.autograd.grad(y.float().square().sum(), trained, allow_unused=True) if g is not None],
        ]

    with monkeypatch.context() as patched:
        patched.setattr(k, "draw", lambda device: drawn.append(draw(device)) or drawn[-1])
        ours = found(run(x, built))
    masks = [k.mask(torch.empty(21, wide, device=device, dtype=dtype), s, 102) for s, wide in zip(drawn, (20, 24))]
    with monkeypatch.context() as patched:
        patched.setattr(ops, "kernel", lambda *_: None)
        patched.setattr(ops, "dropped", lambda x, p: ops.Dropped(x * masks[0], masks.pop(0), 1 - 102 / 256))
        twins = found(run(x, built))
    return ours, twins


@TYPES
def test_layers_that_share_an_input_equal_the_eager_ones_under_the_same_mask(dtype, device, monkeypatch) -> None:
    ours, twins = both(device, dtype, monkeypatch, lambda x, built: torch.cat(fused_linears(x, built[:2]), -1))
    assert all(close(mine, twin, dtype) for mine, twin in zip(ours, twins, strict=True))


@TYPES
def test_gated_blocks_equal_the_eager_ones_under_the_same_masks(dtype, device, monkeypatch) -> None:
    ours, twins = both(device, dtype, monkeypatch, lambda x, built: gated(x, *built, F.silu))
    assert all(close(mine, twin, dtype) for mine, twin in zip(ours, twins, strict=True))


def test_no_mask_is_kept_for_backward(device) -> None:
    x, built, _ = layers(device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_linears(x, built[:2])
    assert [t for t in kept if t.numel() == x.numel() and t.data_ptr() != x.data_ptr()] == []
    assert [t.numel() for t in kept if t.dtype is torch.int64] == [1]


def test_what_is_kept_is_scaled_up(device) -> None:
    """The mean over many masks is the branch without dropout."""
    x = torch.ones(800, 16, device=device)
    a, b = torch.ones(1, 16, device=device), torch.ones(1, 1, device=device)
    (y,) = fused_linears(x, [Layer(torch.zeros(1, 16, device=device), None, LowRank(a, b, 1.0, 0.25))])
    assert abs(y.mean().item() - 16) < 0.4


def test_a_repeated_forward_draws_the_same_mask_from_the_same_state(device) -> None:
    """As a checkpointed block needs it."""
    x, built, _ = layers(device)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(fused_linears(x, built[:1])[0])
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], fused_linears(x, built[:1])[0])


def test_a_gain_has_its_dropped_input_in_memory(device) -> None:
    x, (layer, *_), _ = layers(device)
    low = layer.low._replace(gain=torch.rand(24, device=device).requires_grad_())
    (y,) = fused_linears(x, [layer._replace(low=low)])
    assert torch.autograd.grad(y.sum(), low.gain)[0].abs().sum() > 0
