"""Several adapters train in one pass, each on its own rows of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from veneer import IA3Config, LoraConfig
from veneer.engine.tuner import Tuner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


METHODS = {
    "lora": lambda r: LoraConfig(r=r, target_modules=["first", "second"], init_lora_weights=False),
    "dora": lambda r: LoraConfig(r=r, target_modules=["first", "second"], init_lora_weights=False, use_dora=True),
    "ia3": lambda r: IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_adapter_gets_the_gradients_of_its_own_rows(method: str) -> None:
    tuner, names = Tuner(Net()), ("a", "b", "c")
    for rank, name in enumerate(names, 2):
        torch.manual_seed(rank)
        tuner.add(name, METHODS[method](rank))
    tuner.set_active(*names)
    x, rows = torch.randn(6, 4, 8), ["b", "a", "c", "__base__", "a", "b"]

    def gradients(name: str) -> list[Tensor]:
        return [p.grad.clone() for _, adapter in tuner.adapters(name) for p in adapter.parameters()]

    tuner.route(rows)
    y = tuner.train()(x)
    (y.square().mean(dim=(1, 2))).sum().backward()
    together = {name: gradients(name) for name in names}
    tuner.route(None)
    for name in names:
        tuner.zero_grad()
        tuner.set_active(name)
        own = [i for i, row in enumerate(rows) if row == name]
        alone = tuner(x[own])
        assert torch.allclose(alone, y[own], atol=1e-6)
        (alone.square().mean(dim=(1, 2))).sum().backward()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(together[name], gradients(name), strict=True))
