"""Changes as large as the weight, which the backward pass makes again: the same gradients, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer import GloraConfig, HiraConfig, PeanutConfig, PeftConfig, RandLoraConfig, ShiraConfig
from veneer.core.adapter import Adapter
from veneer.engine.tuner import Tuner

METHODS: dict[str, PeftConfig] = {
    "hira": HiraConfig(r=4, target_modules=["layer"], init_weights=False),
    "glora": GloraConfig(r=4, target_modules=["layer"]),
    "peanut": PeanutConfig(r=4, target_modules=["layer"]),
    "randlora": RandLoraConfig(r=4, target_modules=["layer"], init_weights=False),
    "shira": ShiraConfig(r=4, target_modules=["layer"]),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(method: str, dtype: torch.dtype) -> Tuner:
    tuner = Tuner(Net().to(dtype))
    for name in "ab":
        tuner.add(name, METHODS[method])
        with torch.no_grad():
            for _, adapter in tuner.adapters(name):
                for parameter in adapter.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    tuner.set_active("a")
    return tuner.train()


def gradients(tuner: Tuner, x: Tensor, between: Any = None) -> list[Tensor]:
    wanted = [x.requires_grad_(), *(p for _, a in tuner.adapters("a") for p in a.parameters())]
    y = tuner(x)
    if between is not None:
        between()
    return list(torch.autograd.grad(y.float().pow(2).sum(), wanted))


def kept(tuner: Tuner, x: Tensor) -> int:
    """Bytes that are kept for backward besides the model's own tensors and the input."""
    own = {t.untyped_storage().data_ptr() for t in (x, *tuner.parameters(), *tuner.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        tuner(x)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_a_sum_that_is_kept(method: str, dtype: torch.dtype, monkeypatch) -> None:
    x = torch.randn(5, 48).to(dtype)
    tuner = adapted(method, dtype)
    found = gradients(tuner, x)
    less = kept(tuner, x)
    monkeypatch.setattr(Adapter, "again", False)
    wanted, more = gradients(tuner, x), kept(tuner, x)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    weight = tuner.model.layer.base_layer.weight
    assert less + weight.numel() * weight.element_size() <= more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_another_adapter_made_active_before_the_backward_pass_changes_no_gradient(
    method: str, dtype: torch.dtype
) -> None:
    x = torch.randn(5, 48).to(dtype)
    tuner = adapted(method, dtype)
    wanted = gradients(tuner, x)

    def switch() -> None:
        tuner.set_active("b")
        for _, adapter in tuner.adapters("a"):
            adapter.requires_grad_(True)

    for one, other in zip(gradients(tuner, x, switch), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["input", "adapter", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_what_was_written_before_the_backward_pass_is_an_error(method: str, dtype: torch.dtype, what: str) -> None:
    tuner = adapted(method, dtype)
    x = torch.randn(5, 48).to(dtype).requires_grad_()
    (_, adapter), *_ = tuner.adapters("a")
    own = {"input": x, "adapter": next(adapter.parameters()), "weight": tuner.model.layer.base_layer.weight}[what]
    y = tuner(x)
    with torch.no_grad():
        own.mul_(2)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        y.sum().backward()
