"""LN tuning of a whole block whose inner layers carry other adapters."""

from __future__ import annotations

import torch
from torch import nn

from veneer import LNTuningConfig, LoraConfig
from veneer.engine.tuner import Tuner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


def test_trained_copies_stand_in_for_layers_that_another_adapter_has_wrapped() -> None:
    x, own = torch.randn(3, 4), Net()
    tuner = Tuner(Net())
    tuner.add("block", LNTuningConfig(target_modules=["mlp"]))
    tuner.add("lora", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    block, lora = (next(a for _, a in tuner.adapters(name)) for name in ("block", "lora"))
    with torch.no_grad():
        own.mlp.load_state_dict({name: copy.mul_(1.5) for name, copy in block.overrides().items()})
        tuner.set_active("block")
        assert torch.allclose(tuner(x), own(x), atol=1e-6)
        own.mlp[0].weight += lora.delta_weight()
        tuner.set_active("block", "lora")
        assert torch.allclose(tuner(x), own(x), atol=1e-6)
        tuner.set_active("lora")
        bare = Net()
        bare.mlp[0].weight += lora.delta_weight()
        assert torch.allclose(tuner(x), bare(x), atol=1e-6)
    tuner.set_active("block", "lora")
    tuner(x).sum().backward()
    assert all(p.grad is not None for p in [*block.parameters(), *lora.parameters()])
