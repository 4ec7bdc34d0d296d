"""What is kept from one decoded token to the next is never older than the tensors it was made from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from veneer import DeloraConfig, FourierFTConfig, LoHaConfig, LoraConfig, OFTConfig, ShiraConfig, VeraConfig
from veneer.core.config import PeftConfig
from veneer.engine.lowrank_path import Joint, Own
from veneer.engine.tuner import Tuner

X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(config: PeftConfig, names: str = "a") -> Tuner:
    tuner = Tuner(Net())
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        tuner.add(name, config)
        for _, adapter in tuner.adapters(name):
            for parameter in adapter.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    tuner.set_active(names[0])
    return tuner.eval()


def kept(tuner: Tuner) -> Tensor:
    with torch.no_grad():
        return tuner(X)


def fresh(tuner: Tuner) -> Tensor:
    """The output where gradients are wanted: nothing is kept there."""
    return tuner(X).detach()


METHODS = {
    "delora": DeloraConfig(r=2, target_modules=["layer"]),
    "dora": LoraConfig(r=2, target_modules=["layer"], use_dora=True),
    "fourierft": FourierFTConfig(n_frequency=5, target_modules=["layer"]),
    "loha": LoHaConfig(r=2, target_modules=["layer"]),
    "oft": OFTConfig(oft_block_size=4, target_modules=["layer"]),
    "shira": ShiraConfig(r=1, target_modules=["layer"]),
    "vera": VeraConfig(r=4, target_modules=["layer"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_new_values_are_seen(method: str) -> None:
    tuner = adapted(METHODS[method])
    before = kept(tuner)
    assert torch.allclose(before, fresh(tuner), atol=1e-6) and torch.equal(kept(tuner), before)
    with torch.no_grad():
        for _, adapter in tuner.adapters("a"):
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert not torch.allclose(kept(tuner), before) and torch.allclose(kept(tuner), fresh(tuner), atol=1e-6)
    with torch.no_grad():
        tuner.model.layer.base_layer.weight.mul_(1.5)
    assert torch.allclose(kept(tuner), fresh(tuner), atol=1e-6)
    tuner.double()
    with torch.no_grad():
        assert torch.allclose(tuner(X.double()).float(), kept(tuner.float()), atol=1e-5)


@torch.no_grad()
def test_a_mixed_batch_sees_new_values_names_and_strengths() -> None:
    config = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    tuner = adapted(config, "ab")
    host = tuner.hosts()[0]

    def check(*names: str) -> None:
        each = {}
        tuner.route(None)
        for name in dict.fromkeys(names):
            tuner.set_active(name)
            each[name] = tuner(X)
        tuner.route(names)
        for times in range(3):  # what to keep is known from the second call on
            y = tuner(X)
            assert host._path is not None and (host._path.held is not None) == (times > 0)
            assert all(torch.allclose(y[i], each[name][i], atol=1e-6) for i, name in enumerate(names))

    check("a", "b", "b", "a")
    check("b", "b", "a", "a")
    tuner.route(["a", "b", "b", "a"])
    before = tuner(X)
    host.adapters["a"].lora_A.weight.mul_(2)
    after = tuner(X)
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])
    host.adapters["b"].scaling = 3.0
    host.settle()
    check("a", "b", "b", "a")
    tuner.bfloat16().float()  # the digits that are lost are lost for the batch as well
    check("a", "b", "b", "a")
    tuner.delete("a")
    tuner.add("a", config)
    check("a", "b", "b", "a")


@torch.no_grad()
def test_a_scaling_that_was_set_is_seen_at_once() -> None:
    tuner = adapted(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), "a")
    base, adapter = Net()(X), tuner.hosts()[0].adapters["a"]
    before = [tuner(X) - base for _ in range(3)][-1]
    adapter.scaling = 2 * adapter.scaling
    assert torch.allclose(tuner(X) - base, 2 * before, atol=1e-5)


@torch.no_grad()
def test_the_same_names_again_find_what_was_kept_for_them_unless_something_was_written() -> None:
    tuner = adapted(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), "ab")
    host, names = tuner.hosts()[0], ["a", "b", "b", "a"]
    tuner.route(names)
    before, again = tuner(X), tuner(X)
    first = host._path.held
    assert first is not None and torch.allclose(before, again, atol=1e-6)
    tuner.route(None)
    tuner.route(names)
    assert torch.equal(tuner(X), tuner(X)) and host._path.held is first
    host.adapters["a"].lora_A.weight.mul_(2)
    tuner.route(None)
    tuner.route(names)
    assert not torch.equal(tuner(X)[0], before[0]) and host._path.held is not first


@torch.no_grad()
def test_rows_of_other_ranks_beams_and_rows_of_none_each_have_their_own_branch() -> None:
    tuner = Tuner(Net())
    for rank, name in enumerate("abc", 1):
        tuner.add(name, LoraConfig(r=rank, lora_alpha=3, target_modules=["layer"], init_lora_weights=False))
    tuner.eval()
    alone = {"__base__": Net()(X)}
    for name in "abc":
        tuner.set_active(name)
        alone[name] = tuner(X)
    for route, times, kind in ((["c", "__base__", "a", "b"], 1, Own), (["c", "a"], 2, Joint)):
        tuner.route(route)
        names = [name for name in route for _ in range(times)]
        for x in (X, X[:, 0], X[:, None]):
            for _ in range(3):
                y = tuner(x)
            assert isinstance(tuner.hosts()[0]._path.held, kind)
            for i, name in enumerate(names):
                assert torch.allclose(y[i].reshape(-1, 8), alone[name][i, : x[i].numel() // 8], atol=1e-6)


@torch.no_grad()
def test_texts_of_other_lengths_and_the_same_adapters_in_other_rows_share_the_stack() -> None:
    tuner = adapted(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), "ab")
    alone = {}
    for name in "ab":
        tuner.set_active(name)
        alone[name] = tuner(X)
    stacks = []
    for route in (["b", "a", "a", "b"], ["a", "b", "b", "a"]):
        tuner.route(route)
        for x in (X, X[:, :1], X, X[:, :1], X[:, :1], X):
            y = tuner(x)
            for i, name in enumerate(route):
                assert torch.allclose(y[i], alone[name][i, : x.shape[1]], atol=1e-6)
        stacks.append(tuner.hosts()[0]._path.stack)
    assert stacks[0] is stacks[1]


@torch.no_grad()
def test_a_batch_that_is_routed_again_sees_what_was_written_meanwhile() -> None:
    tuner = adapted(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), "ab")
    weight = tuner.hosts()[0].adapters["a"].lora_B.weight

    def runs() -> Tensor:
        tuner.route(["a", "b", "b", "a"])
        return [tuner(X) for _ in range(3)][-1]

    before = runs()
    weight.mul_(2)
    after = runs()
    assert not torch.allclose(after[0], before[0]) and torch.equal(after[1], before[1])
    twin = copy.deepcopy(tuner)
    twin.hosts()[0].adapters["a"].lora_B.weight.zero_()
    twin.route(["a", "b", "b", "a"])
    assert torch.allclose(twin(X)[0], Net()(X)[0], atol=1e-6) and torch.equal(runs(), after)
