"""MoLA: each token by itself, k experts a token, more experts in deeper layers, padding outside the balance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer import LoraConfig, MolaConfig, get_peft_model
from veneer.engine.tuner import Tuner
from veneer.methods.mola import Mola
from veneer.ops.gating import gated_lowrank, gated_lowrank_naive, load_balance, top_k_softmax


class Blocks(nn.Module):
    def __init__(self, layers: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def tuned(layers: int = 4, **options) -> Tuner:
    tuner = Tuner(Blocks(layers))
    tuner.add("a", MolaConfig(**({"r": 2, "target_modules": r"layers\.\d+"} | options)))
    tuner.set_active("a")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuner.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return tuner


def experts(tuner: Tuner) -> list[Mola]:
    return [a for _, a in tuner.adapters("a")]


def test_gated_products_equal_expert_by_expert() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5, 8), (4, 2, 8), (4, 6, 2)))
    gates, _ = top_k_softmax(torch.randn(3, 5, 4, dtype=torch.float64), 2)
    assert torch.allclose(gated_lowrank(x, a, b, gates), gated_lowrank_naive(x, a, b, gates))
    g = torch.randn(3, 5, 6, dtype=torch.float64)
    for ours, twin in zip(
        torch.autograd.grad(gated_lowrank(x, a, b, gates), (x, a, b), g),
        torch.autograd.grad(gated_lowrank_naive(x, a, b, gates), (x, a, b), g),
        strict=True,
    ):
        assert torch.allclose(ours, twin)


def test_exactly_k_gates_that_sum_to_one() -> None:
    gates, p = top_k_softmax(torch.randn(50, 6), 2)
    assert ((gates > 0).sum(-1) == 2).all() and torch.allclose(gates.sum(-1), torch.ones(50))
    assert torch.equal(gates.argmax(-1), p.argmax(-1))
    dense, p = top_k_softmax(torch.randn(5, 3), 3)
    assert torch.equal(dense, p)


def test_balance_is_one_when_uniform_and_ignores_padding() -> None:
    uniform = torch.full((60, 3), 1 / 3)
    gates = torch.eye(3).repeat(20, 1)
    assert torch.allclose(load_balance(gates, uniform), torch.tensor(1.0))
    lopsided = torch.tensor([[1.0, 0.0, 0.0]]).repeat(60, 1)
    assert load_balance(lopsided, lopsided) == 3
    mixed_p, mixed_g = torch.cat([uniform, lopsided]), torch.cat([gates, lopsided])
    mask = torch.tensor([1] * 60 + [0] * 60)
    assert torch.allclose(load_balance(mixed_g, mixed_p, mask), torch.tensor(1.0))
    assert load_balance(mixed_g, mixed_p) > 1.5


@pytest.mark.parametrize(
    ("wanted", "counts"),
    [
        ("2468", [2, 4, 6, 8]),
        ("8228", [8, 2, 2, 8]),
        (3, [3, 3, 3, 3]),
        ([2, 5], [2, 2, 5, 5]),
        ([2, 3, 4, 5], [2, 3, 4, 5]),
    ],
)
def test_experts_by_depth(wanted, counts: list[int]) -> None:
    assert [a.mola_A.shape[0] for a in experts(tuned(experts=wanted, top_k=2))] == counts


def test_one_expert_is_lora() -> None:
    routed = tuned(experts=1, top_k=1, lora_alpha=8)
    plain = Tuner(Blocks())
    plain.add("a", LoraConfig(r=2, lora_alpha=8, target_modules=r"layers\.\d+"))
    plain.set_active("a")
    with torch.no_grad():
        for (_, m), (_, lora) in zip(routed.adapters("a"), plain.adapters("a"), strict=True):
            lora.lora_A.weight.copy_(m.mola_A[0])
            lora.lora_B.weight.copy_(m.mola_B[0])
    x = torch.randn(3, 5, 8)
    assert torch.allclose(routed.eval()(x), plain.eval()(x), atol=1e-6)


def test_tokens_do_not_see_each_other() -> None:
    tuner, x = tuned(experts=4).eval(), torch.randn(3, 5, 8)
    y = tuner(x)
    order = torch.randperm(5)
    assert torch.allclose(tuner(x[:, order]), y[:, order], atol=1e-6)
    assert torch.allclose(tuner(x[1:2]), y[1:2], atol=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_balance_term_reaches_the_routers_and_skips_padding(checkpointed: bool) -> None:
    tuner, x = tuned(experts=4, balance_weight=0.1).train(), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def run(v):
        return tuner(v, attention_mask=mask)

    y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    term = tuner.penalty()
    assert 0.1 * 4 <= float(term.detach()) <= 0.1 * 4 * 4
    (y.sum() * 0 + term).backward()
    assert all(a.mola_router.grad.abs().sum() > 0 for a in experts(tuner))
    noisy = x.clone()
    noisy[1, 2:] += 100
    tuner(noisy, attention_mask=mask)
    assert torch.allclose(tuner.penalty(), term, atol=1e-6)
    assert tuner.eval()(x) is not None and tuner.penalty() is None


def test_reentrant_checkpointing_is_refused_with_the_remedy() -> None:
    tuner, x = tuned(experts=2).train(), torch.randn(2, 5, 8, requires_grad=True)
    torch.utils.checkpoint.checkpoint(tuner, x, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        tuner.penalty()


def test_it_learns_what_one_branch_of_that_rank_cannot_route() -> None:
    """Two kinds of tokens that want opposite maps: gates tell them apart, which no linear branch can."""

    def last_loss(config) -> float:
        torch.manual_seed(0)
        return _fit(get_peft_model(nn.Sequential(nn.Linear(8, 8)), config))

    routed = last_loss(MolaConfig(r=1, experts=2, top_k=2, target_modules=["0"], balance_weight=0.01))
    assert routed < 0.5 * last_loss(LoraConfig(r=2, lora_alpha=16, target_modules=["0"]))


def _fit(model) -> float:
    torch.manual_seed(1)
    x = torch.randn(256, 8)
    x[:, 0] = torch.where(torch.arange(256) % 2 == 0, 2.0, -2.0)
    with model.disable_adapter(), torch.no_grad():
        target = model(x) + x.abs()[:, :1] * torch.ones(8)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(200):
        loss = (model(x) - target).square().mean()
        (loss + (model.base_model.penalty() or 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("options", "words"),
    [({"experts": 2, "top_k": 3}, "top_k=3"), ({"experts": "9999"}, "2468"), ({"experts": [2, 0]}, "positive")],
)
def test_bad_settings_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tuned(**options)
