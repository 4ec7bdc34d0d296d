"""The flat AdamW is AdamW: step by step, with clipping, missing gradients, a saved state, and parameters that move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from veneer.train.flat import FlatAdamW

SETTINGS = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,), (2, 2, 2), (), (7, 1))]


def gradients(params: list[nn.Parameter], seed: int, without: tuple[int, ...] = ()) -> None:
    torch.manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn_like(p)
        p.grad = None if i in without else grad


def stepped(kind, params, steps, state=None, clip=None, without=lambda step: (), groups=None):
    optimizer = kind(groups(params) if groups else params, **SETTINGS)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        gradients(params, step, without(step))
        if clip:
            if kind is FlatAdamW:
                norm = optimizer.clip_grad_norm_(clip)
            else:
                norm = nn.utils.clip_grad_norm_(params, clip)
            optimizer.last = norm
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_and_clipping_are_adamws(clip: float | None, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    mine = stepped(FlatAdamW, ours, range(5), clip=clip)
    twin = stepped(torch.optim.AdamW, theirs, range(5), clip=clip)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    if clip:
        torch.testing.assert_close(mine.last.to(twin.last), twin.last, rtol=1e-5, atol=1e-6)


def test_groups_have_settings_of_their_own() -> None:
    def groups(params):
        return [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.0}]

    ours, theirs = parameters(), parameters()
    stepped(FlatAdamW, ours, range(3), groups=groups)
    stepped(torch.optim.AdamW, theirs, range(3), groups=groups)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_stays_and_does_not_age() -> None:
    def without(step: int) -> tuple[int, ...]:
        return {1: (0, 3), 2: (1,), 4: (0, 1, 2, 3, 4)}.get(step, ())

    ours, theirs = parameters(), parameters()
    stepped(FlatAdamW, ours, range(7), without=without, clip=1.0)
    stepped(torch.optim.AdamW, theirs, range(7), without=without, clip=1.0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [FlatAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("then", [FlatAdamW, torch.optim.AdamW])
def test_a_run_goes_on_exactly_from_a_saved_state_of_either(first, then, tmp_path) -> None:
    whole, parted = parameters(), parameters()
    stepped(torch.optim.AdamW, whole, range(6))
    state = stepped(first, parted, range(3)).state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    fresh = [nn.Parameter(p.detach().clone()) for p in parted]
    stepped(then, fresh, range(3, 6), state=torch.load(tmp_path / "optimizer.pt"))
    for a, b in zip(fresh, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_values_put_into_a_parameter_are_taken_up_and_changes_are_counted() -> None:
    ours, theirs = parameters(), parameters()
    mine, twin = FlatAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(4):
        for params, optimizer in ((ours, mine), (theirs, twin)):
            gradients(params, step)
            if step == 2:
                params[0].data = torch.ones(3, 4)  # new memory
                params[1].data.mul_(2)
            before = [p._version for p in params]
            optimizer.step()
            assert all(p._version > v for p, v in zip(params, before, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autograd_accumulates_into_its_gradients() -> None:
    layers = [nn.Linear(4, 3), nn.Linear(4, 3)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 4)
    for layer, kind in zip(layers, (FlatAdamW, torch.optim.AdamW), strict=True):
        optimizer = kind(layer.parameters(), **SETTINGS)
        for set_to_none in (True, False, True):
            layer(x).square().sum().backward()
            layer(2 * x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-5, atol=1e-6)


def test_it_copies() -> None:
    params = parameters()
    optimizer = stepped(FlatAdamW, params, range(2))
    twin = copy.deepcopy(optimizer)
    copied = twin.param_groups[0]["params"]
    for own, opt in ((params, optimizer), (copied, twin)):
        gradients(own, 5)
        opt.step()
    for a, b in zip(params, copied, strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_lie_in_a_buffer_is_refused() -> None:
    optimizer = FlatAdamW([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(3, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW"):
        optimizer.step()
