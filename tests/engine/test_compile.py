"""A compiled graph serves whatever adapters are on: no switch compiles anything anew; results are the eager ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from laws.kinds import KINDS
from laws.table import Row, rows
from veneer import LoraConfig
from veneer.engine.tuner import Tuner
from veneer.testing.laws import near, planted


class Net(nn.Module):
    """An embedding, a convolution and two linear layers, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 6, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.conv(x.mT).mT
        return self.second(torch.tanh(self.first(x)))


IDS = torch.arange(20).reshape(4, 5) % 11


def adapted(names: str = "abc", layers: tuple[str, ...] = ("first", "second"), **options) -> Tuner:
    tuner = Tuner(Net())
    for rank, name in enumerate(names, 2):
        torch.manual_seed(rank)
        tuner.add(name, LoraConfig(r=rank, target_modules=list(layers), init_lora_weights=False, **options))
        for _, adapter in tuner.adapters(name):
            for parameter in adapter.parameters():
                parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    tuner.set_active(names[0])
    return tuner.eval()


class Compiled:
    """A model compiled into one graph, by a backend that counts and runs what it is given as it is."""

    def __init__(self, model: nn.Module):
        torch._dynamo.reset()
        self.graphs = 0
        self.model, self.run = model, torch.compile(model, backend=self.count, fullgraph=True)

    def count(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs += 1
        return graph.forward

    def equals_eager(self, *args, **kwargs) -> bool:
        return torch.allclose(self.run(*args, **kwargs), self.model(*args, **kwargs), atol=1e-6)


OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "other layers": {"layers": ("table", "conv")},
}
COPIES = {"layers": ("first",), "modules_to_save": ["second"]}


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_switching_compiles_nothing_anew(kind: str) -> None:
    tuner = adapted(**OPTIONS[kind])
    host = tuner.hosts("b")[-1]
    compiled = Compiled(tuner)
    seen = []

    def check() -> None:
        assert compiled.equals_eager(IDS)
        assert compiled.graphs == 1
        seen.append(compiled.run(IDS))

    check()
    for active in (("b",), ("c",), ("a", "b"), ("a", "c"), (), ("b",)):
        tuner.set_active(*active)
        check()
    with tuner.disabled():
        check()
        assert torch.equal(seen[-1], Net()(IDS))
    check()
    host.set_gain("b", 0.5)
    check()
    tuner.state.gains = {"b": 2.0}
    check()
    tuner.state.gains = {}
    host.set_gain("b", 1.0)
    for _, adapter in tuner.adapters("b"):
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    check()
    different = [y for i, y in enumerate(seen) if not any(torch.allclose(y, z, atol=1e-6) for z in seen[:i])]
    assert len(different) == 9  # ("b",) and () come again, and so does what was on before disabling


@torch.no_grad()
def test_the_order_of_active_adapters_counts_where_it_matters() -> None:
    tuner = adapted("ab", layers=("second",), use_dora=True)
    compiled = Compiled(tuner)
    tuner.set_active("a", "b")
    assert compiled.equals_eager(IDS)
    there = compiled.run(IDS)
    tuner.set_active("b", "a")
    assert compiled.equals_eager(IDS) and not torch.allclose(compiled.run(IDS), there, atol=1e-6)
    tuner = adapted("ab", layers=("second",))
    compiled = Compiled(tuner)
    for active in (("a", "b"), ("b", "a")):
        tuner.set_active(*active)
        assert compiled.equals_eager(IDS) and compiled.graphs == 1


@pytest.mark.parametrize("kind", ["lora", "dora"])
@torch.no_grad()
def test_another_mixed_batch_compiles_nothing_anew(kind: str) -> None:
    tuner = adapted(**OPTIONS[kind])
    compiled = Compiled(tuner)
    for route in (["a", "b", "__base__", "c"], ["c", "c", "a", "b"], ["__base__"] * 4):
        tuner.route(route)
        assert compiled.equals_eager(IDS)
    with tuner.disabled():
        assert compiled.equals_eager(IDS)
    assert compiled.graphs == 1


@pytest.mark.parametrize("kind", ["lora", "dora", "other layers", "copies"])
def test_compiled_gradients_are_the_eager_ones(kind: str) -> None:
    tuner = adapted("ab", **(OPTIONS | {"copies": COPIES})[kind]).train()
    compiled = Compiled(tuner)

    def gradients(model: Callable) -> list[Tensor]:
        tuner.zero_grad()
        model(IDS).square().sum().backward()
        return [p.grad.clone() for p in tuner.parameters() if p.requires_grad]

    for gain in (1.0, 0.25):
        for host in tuner.hosts():
            host.set_gain("a", gain)
        ours, eager = gradients(compiled.run), gradients(tuner)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, eager, strict=True))
        assert all(p.grad is None for _, other in tuner.adapters("b") for p in other.parameters())
    assert compiled.graphs == 1


def test_strengths_may_change_between_forward_and_backward() -> None:
    tuner = adapted("ab", layers=("second",))
    compiled = Compiled(tuner)
    loss = compiled.run(IDS).square().sum()
    with tuner.disabled():
        pass
    tuner.set_active("b")
    tuner.set_active("a")
    loss.backward()
    assert all(p.grad is not None for _, a in tuner.adapters("a") for p in a.parameters())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_in_training_is_one_graph(kind: str) -> None:
    tuner = adapted("a", layers=("second",), lora_dropout=0.5, **OPTIONS[kind]).train()
    compiled = Compiled(tuner)
    once, twice = compiled.run(IDS), compiled.run(IDS)
    assert compiled.graphs == 1 and not torch.allclose(once, twice)
    once.sum().backward()
    assert all(p.grad is not None for _, a in tuner.adapters("a") for p in a.parameters())
    tuner.eval()
    assert compiled.equals_eager(IDS) and compiled.graphs == 2


def test_a_copy_has_switches_of_its_own() -> None:
    tuner = adapted(layers=("second",))
    twin = copy.deepcopy(tuner)
    compiled = Compiled(twin)
    twin.set_active("b")
    with torch.no_grad():
        assert compiled.equals_eager(IDS)
        twin.set_active("c")
        assert compiled.equals_eager(IDS) and compiled.graphs == 1
    assert tuner.state.active == ("a",)


@torch.no_grad()
def test_tensors_that_moved_are_followed() -> None:
    tuner = adapted("ab", layers=("second",))
    compiled = Compiled(tuner)
    assert compiled.equals_eager(IDS)
    tuner.double()
    assert compiled.equals_eager(IDS) and compiled.graphs == 2
    tuner.hosts()[0].adapters["a"].lora_A.weight.data.mul_(2)
    assert compiled.equals_eager(IDS)
    tuner.delete("a")
    tuner.set_active("b")
    assert compiled.equals_eager(IDS) and compiled.graphs == 3


QUICK = ("ia3", "oft", "lokr", "hira", "bottleneck", "ln_tuning", "vera", "mola", "dora_dropout")
KIND = ("linear", "feed_forward", "embedding", "block")


def every_method() -> list:
    """One row of the laws' table for each method, at one kind of layer it sits at."""
    first: dict[object, object] = {}
    for row in rows():
        kind = next((kind for kind in KIND if kind in (row.tested or row.kinds)), None)
        if kind is not None:
            config = row.make(**KINDS[kind].targets)
            key = row.name if row.name in QUICK else config.peft_type
            mark = () if row.name in QUICK else pytest.mark.slow
            first.setdefault(key, pytest.param(row, kind, id=row.name, marks=mark))
    return list(first.values())


@pytest.mark.parametrize(("row", "kind"), every_method())
@torch.no_grad()
def test_switching_adapters_of_any_method_compiles_nothing_anew(row: Row, kind: str) -> None:
    tuner, x = planted(row, kind, names=("a", "b"))
    compiled = Compiled(tuner)
    seen = []

    def check(graphs: int = 1) -> None:
        ours, eager = compiled.run(x), tuner(x)
        assert near(ours, eager, 1e-5)
        assert compiled.graphs == graphs
        seen.append(ours)

    check()
    tuner.set_active("b")
    check()
    tuner.set_active("a")
    check()
    with tuner.disabled():
        check()
        assert torch.equal(seen[-1], tuner(x))
    for host in tuner.hosts():
        host.set_gain("a", 0.5)
    check()
    if row.combines:
        tuner.set_active("a", "b")
        check()
    assert torch.equal(seen[0], seen[2]) and not near(seen[0], seen[1], 1e-6)
    for batch in (["a", "b", "__base__", "b"], ["b", "a", "a", "b"]):
        tuner.route(batch)
        check(graphs=2)


@torch.no_grad()
def test_switching_whole_copies_compiles_nothing_anew() -> None:
    tuner = adapted("ab", **COPIES)
    compiled = Compiled(tuner)
    seen = []
    for active in (("a",), ("b",), (), ("a",)):
        tuner.set_active(*active)
        assert compiled.equals_eager(IDS) and compiled.graphs == 1
        seen.append(compiled.run(IDS))
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[2], Net()(IDS))
    assert not torch.allclose(seen[0], seen[1], atol=1e-6)
    tuner.route(["a", "__base__", "b", "a"])
    assert compiled.equals_eager(IDS) and compiled.graphs == 2


@torch.no_grad()
def test_unmerging_goes_back_to_the_first_graph() -> None:
    tuner = adapted("ab")
    compiled = Compiled(tuner)
    for merged in (False, True, False, True):
        if merged:
            tuner.merge()
        else:
            tuner.unmerge()
        assert compiled.equals_eager(IDS)
    assert compiled.graphs == 2


@pytest.mark.parametrize("name", ["ia3", "oft", "hira", "bitfit", "bottleneck"])
def test_gradients_of_other_methods_are_the_eager_ones(name: str) -> None:
    row = next(row for row in rows() if row.name == name)
    tuner, x = planted(row, "linear", names=("a", "b"))
    compiled = Compiled(tuner)

    def gradients(model: Callable) -> list[Tensor]:
        tuner.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in tuner.parameters() if p.requires_grad]

    for name in ("b", "a"):
        tuner.set_active(name)
        ours, eager = gradients(compiled.run), gradients(tuner)
        assert eager and all(near(a, b, 1e-5) for a, b in zip(ours, eager, strict=True))
    assert compiled.graphs == 1
