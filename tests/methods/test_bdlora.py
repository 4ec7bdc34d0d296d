"""BD-LoRA: the block-diagonal product, which layers it takes, parity both ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laws.kinds import Chain
from methods.test_lora import base_of, inputs_of
from parity import both_ways, call, near, needs_peer, ours, peer, read
from veneer import BdLoraConfig, LoraConfig
from veneer.engine.tuner import Tuner


@pytest.mark.parametrize("which", ["A", "B"])
def test_forward_is_the_block_diagonal_product(which: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 12), torch.randn(3, 5, 8)
    blocks = BdLoraConfig(["layer"], None, 4) if which == "A" else BdLoraConfig(None, ["layer"], 4)
    tuner = ours(Chain(None, layer), LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], use_bdlora=blocks))
    adapter = next(iter(tuner.adapters("default")))[1]
    a, b = adapter.lora_A.weight, adapter.lora_B.weight
    assert (a.shape, b.shape) == (((4, 2), (12, 4)) if which == "A" else ((4, 8), (12, 1)))
    full = b @ torch.block_diag(*a.chunk(4)) if which == "A" else torch.block_diag(*b.chunk(4)) @ a
    assert near(tuner(x), x @ (layer.weight + 2.0 * full).T + layer.bias, 1e-5)


def test_layers_must_be_named_and_divisible() -> None:
    def add(blocks: BdLoraConfig, r: int = 4) -> None:
        Tuner(Chain(None, nn.Linear(8, 12))).add("a", LoraConfig(r=r, target_modules=["layer"], use_bdlora=blocks))

    with pytest.raises(ValueError, match="neither of target_modules_bd_a"):
        add(BdLoraConfig(["o_proj"], None, 2))
    add(BdLoraConfig(["o_proj"], None, 2, match_strict=False))
    with pytest.raises(ValueError, match="3 blocks do not divide"):
        add(BdLoraConfig(["layer"], None, 3))


@needs_peer
@pytest.mark.parametrize(
    ("which", "options"),
    [
        ("target_modules_bd_a", {}),
        ("target_modules_bd_b", {}),
        ("target_modules_bd_b", {"use_rslora": True}),
        ("target_modules_bd_a", {"lora_bias": True}),
    ],
)
def test_parity(which: str, options: dict, tmp_path) -> None:
    import peft

    settings, blocks = {"r": 4, "target_modules": ["layer"]} | options, {which: ["layer"], "nblocks": 2}
    both_ways(
        base_of("linear"), peft.LoraConfig(**settings, use_bdlora=peft.BdLoraConfig(**blocks)),
        LoraConfig(**settings, use_bdlora=BdLoraConfig(**blocks)), inputs_of("linear"), tmp_path,
    )  # fmt: skip


@needs_peer
def test_a_bias_that_the_peer_forgot_is_read_as_none(tmp_path) -> None:
    import peft

    blocks = peft.BdLoraConfig(target_modules_bd_b=["layer"], nblocks=2)
    settings = {"r": 4, "target_modules": ["layer"], "lora_bias": True, "use_bdlora": blocks}
    theirs = peer(base_of("linear")(), peft.LoraConfig(**settings))
    theirs.save_pretrained(tmp_path)
    x = inputs_of("linear")
    assert near(read(base_of("linear")(), tmp_path)(x), call(theirs, x), 1e-5)
