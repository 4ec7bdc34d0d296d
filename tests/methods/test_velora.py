"""VeLoRA: exact forward, the compressed gradient of A, exact other gradients, what is kept, parity both ways."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laws.kinds import Chain
from methods.test_lora import base_of, inputs_of
from parity import both_ways, call, near, needs_peer, ours, peer, read
from veneer import LoraConfig, VeloraConfig
from veneer.engine.tuner import Tuner


def velora(**settings) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], velora_config=VeloraConfig(num_groups=4, **settings))


@pytest.mark.parametrize("how", ["batch_average", "batch_average_once", "random"])
def test_gradient_of_a_sees_the_projected_input_and_all_others_the_true_one(how: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 5)
    x = torch.randn(2, 6, 12, requires_grad=True)
    g = torch.randn(2, 6, 5)
    tuner = ours(Chain(None, layer), velora(init_type=how, scale=0.5)).train()
    adapter = next(iter(tuner.adapters("default")))[1]
    a, b = adapter.lora_A.weight, adapter.lora_B.weight
    y = tuner(x)
    assert near(y, layer(x) + 2.0 * x @ a.T @ b.T, 1e-6)
    (y * g).sum().backward()
    v = adapter.lora_velora_embed
    assert abs(v.norm() - 1) < 1e-6
    if how != "random":
        assert near(v, F.normalize(x.detach().reshape(-1, 3).mean(0), dim=0), 1e-6)
    groups = x.detach().unflatten(-1, (4, 3))
    seen = 0.5 * ((groups @ v)[..., None] * v).flatten(-2)
    da = torch.einsum("bto,btr->or", 2.0 * g @ b, seen)
    assert near(a.grad, da, 1e-4)
    assert near(b.grad, 2.0 * torch.einsum("bto,btr->or", g, x @ a.T), 1e-4)
    assert near(x.grad, g @ (layer.weight + 2.0 * b @ a), 1e-4)


def test_the_direction_is_kept_or_follows_the_batch() -> None:
    for how, moves in (("batch_average", True), ("batch_average_once", False), ("random", False)):
        tuner = ours(Chain(None, nn.Linear(12, 5)), velora(init_type=how)).train()
        adapter = next(iter(tuner.adapters("default")))[1]
        tuner(torch.randn(4, 12))
        first = adapter.lora_velora_embed.clone()
        tuner(torch.randn(4, 12))
        assert torch.equal(first, adapter.lora_velora_embed) != moves
        tuner.eval()(torch.randn(4, 12))


def test_the_input_is_not_kept() -> None:
    kept = []
    tuner = ours(Chain(None, nn.Linear(64, 5)), velora()).train()
    x = torch.randn(10, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        tuner(x)
    assert (10, 4) in kept and (10, 64) not in kept


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="num_groups=4 does not divide the 10 inputs"):
        Tuner(Chain(None, nn.Linear(10, 5))).add("a", velora())


@needs_peer
@pytest.mark.parametrize("how", ["batch_average", "batch_average_once", "random"])
@pytest.mark.parametrize("kind", ["linear", "conv1d_hf"])
def test_parity(kind: str, how: str, tmp_path) -> None:
    import peft

    settings, own = {"r": 4, "target_modules": ["layer"]}, {"num_groups": 4, "init_type": how}
    both_ways(
        base_of(kind), peft.LoraConfig(**settings, velora_config=peft.VeloraConfig(**own)),
        LoraConfig(**settings, velora_config=VeloraConfig(**own)), inputs_of(kind), tmp_path,
    )  # fmt: skip


@needs_peer
def test_training_gradients_are_the_peers(tmp_path) -> None:
    import peft

    own = {"num_groups": 4, "scale": 0.7}
    theirs = peer(
        base_of("linear")(), peft.LoraConfig(r=4, target_modules=["layer"], velora_config=peft.VeloraConfig(**own))
    )
    theirs.save_pretrained(tmp_path)
    mine = read(base_of("linear")(), tmp_path)
    mine.set_active("default")
    x = inputs_of("linear")
    for model in (theirs.train(), mine.train()):
        call(model, x).square().sum().backward()
    (adapter,) = [a for _, a in mine.adapters("default")]
    layer = theirs.base_model.model.layer
    assert near(adapter.lora_A.weight.grad, layer.lora_A["default"].weight.grad, 1e-4)
    assert near(adapter.lora_B.weight.grad, layer.lora_B["default"].weight.grad, 1e-4)
