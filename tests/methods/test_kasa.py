"""KaSA: the cut base, the formula, the regulariser like the peer's, its delta against the original base, parity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laws.kinds import Chain
from methods.test_lora import base_of, inputs_of
from parity import both_ways, near, needs_peer, ours, peer, read
from veneer import KasaConfig, LoraConfig
from veneer.engine.combine import add_weighted_adapter
from veneer.engine.tuner import Tuner


def kasa(**settings) -> LoraConfig:
    return LoraConfig(**({"r": 3, "target_modules": ["layer"], "kasa_config": KasaConfig()} | settings))


def cut(weight: torch.Tensor, r: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :-r] * s[:-r]) @ vh[:-r]


def test_forward_is_the_papers_and_off_is_the_true_base() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 9), torch.randn(4, 7)
    plain = layer(x)
    tuner = ours(Chain(None, layer), kasa(lora_alpha=6))
    adapter = next(iter(tuner.adapters("default")))[1]
    with tuner.disabled():
        weight = layer.weight.detach().clone()
        assert torch.equal(tuner(x), plain)
    full = cut(weight, 3) + 2.0 * adapter.lora_B.weight @ torch.diag(adapter.lora_diag) @ adapter.lora_A.weight
    assert near(tuner(x), x @ full.T + layer.bias, 1e-5)
    assert tuner.unload().layer is layer and torch.equal(layer(x), plain)


def test_as_lora_it_counts_what_was_taken_out() -> None:
    torch.manual_seed(0)
    tuner = ours(Chain(None, nn.Linear(7, 9)), kasa())
    x = torch.randn(4, 7)
    expected = tuner(x)
    add_weighted_adapter(tuner, ["default"], [1.0], "plain", "cat")
    tuner.set_active("plain")
    assert near(tuner(x), expected, 1e-5)


def test_a_rank_that_leaves_nothing_is_refused() -> None:
    tuner = Tuner(Chain(None, nn.Linear(4, 9)))
    with pytest.raises(ValueError, match="leaves nothing"):
        tuner.add("a", kasa(r=4))
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        tuner.add("a", kasa(init_lora_weights="pissa"))


@needs_peer
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 16}, {"lora_dropout": 0.2}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear_no_bias"])
def test_parity(kind: str, options: dict, tmp_path) -> None:
    import peft

    settings = {"r": 4, "target_modules": ["layer"]} | options
    both_ways(
        base_of(kind), peft.LoraConfig(**settings, kasa_config=peft.KasaConfig()),
        LoraConfig(**settings, kasa_config=KasaConfig()), inputs_of(kind), tmp_path,
    )  # fmt: skip


@needs_peer
def test_the_regulariser_is_the_peers(tmp_path) -> None:
    import peft

    theirs = peer(
        base_of("linear")(),
        peft.LoraConfig(r=4, target_modules=["first", "layer"], kasa_config=peft.KasaConfig(beta=0.3, gamma=0.2)),
    )
    theirs.save_pretrained(tmp_path)
    mine = read(base_of("linear")(), tmp_path)
    assert torch.allclose(mine.penalty(), theirs.base_model._get_kasa_loss(), rtol=1e-5)
