"""QA-LoRA: group means, a delta that is constant within a group, group sizes that fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laws.kinds import Chain
from parity import near, ours
from veneer import LoraConfig
from veneer.engine.tuner import Tuner


def qalora(**settings) -> LoraConfig:
    return LoraConfig(**({"r": 3, "target_modules": ["layer"], "use_qalora": True, "qalora_group_size": 4} | settings))


def test_forward_is_lora_on_group_means() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 5), torch.randn(2, 6, 12)
    tuner = ours(Chain(None, layer), qalora(lora_alpha=6))
    adapter = next(iter(tuner.adapters("default")))[1]
    assert adapter.lora_A.weight.shape == (3, 3)
    pooled = nn.functional.avg_pool1d(x, 4)
    expected = layer(x) + 2.0 * pooled @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    assert near(tuner(x), expected, 1e-5)


def test_the_delta_is_constant_within_a_group_so_zero_points_can_hold_it() -> None:
    tuner = ours(Chain(None, nn.Linear(12, 5)), qalora())
    delta = next(iter(tuner.adapters("default")))[1].delta_weight().detach().unflatten(1, (-1, 4))
    assert torch.equal(delta, delta[..., :1].expand_as(delta))


def test_group_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="qalora_group_size=5 does not divide the 12 inputs"):
        Tuner(Chain(None, nn.Linear(12, 5))).add("a", qalora(qalora_group_size=5))
