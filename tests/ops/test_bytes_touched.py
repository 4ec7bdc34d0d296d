"""What an adapted layer costs in memory traffic, forward and backward, over the frozen layer: counted, not timed.

In units of one activation, tokens x features, which a square weight has too where there are as many tokens as
features: the frozen layer's two products move 6. A LoRA branch, one product at a time, reads x (1) for its inner
product, reads and writes the output it is added to (2), reads the output's gradient for that of B (1) and for that of
the inner product (1), reads x for that of A (1), and reads and writes x's gradient (2): 14 / 6 = 2.33. What has the
size of the factors comes to it twelve times, which makes it 2.35, and the casts of float32 factors and of their
gradients make it 2.37. Only a kernel that has two of these products in one reading (``ops.triton``) can do with less,
or a second weight in memory with the branch in it, which half precision would round away.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from veneer import LoraConfig
from veneer.engine.tuner import Tuner

_spec = importlib.util.spec_from_file_location("common", Path(__file__).parents[2] / "benchmarks" / "common.py")
common = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(common)

SIZE, RANK = 512, 4  # of 2048 and 16, so that each share of the traffic stays what it is there


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE, bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def touched(model: nn.Module) -> int:
    """Bytes read and written by a forward and a backward pass over as many tokens as there are features."""
    x = torch.randn(1, SIZE, SIZE).bfloat16().requires_grad_()
    grad = torch.randn(1, SIZE, SIZE).bfloat16()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    torch.autograd.grad(model(x), wanted, grad)  # what is done once, and kept, does not count
    with common.Touched() as count:
        torch.autograd.grad(model(x), wanted, grad)
    return count.bytes


@pytest.mark.parametrize(
    ("options", "most"), [({}, 2.4), ({"lora_dropout": 0.1}, 3.5), ({"use_dora": True}, 3.5)], ids=str
)
def test_an_adapted_layer_touches_few_bytes_more_than_the_frozen_one(options: dict, most: float) -> None:
    base = touched(Net())
    assert base == 6 * SIZE * SIZE * 2  # two products of two matrices each: what the arithmetic needs
    tuner = Tuner(Net())
    tuner.add("a", LoraConfig(r=RANK, target_modules=["layer"], init_lora_weights=False, **options))
    tuner.set_active("a")
    tuner.train()
    assert all(p.dtype == torch.float32 for p in tuner.parameters() if p.requires_grad)
    assert base < touched(tuner) <= most * base
