"""LoRA on the routed tokens of fused experts equals dense deltas on all experts, forward and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from veneer import LoraConfig
from veneer.engine import experts_path
from veneer.engine.tuner import Tuner
from veneer.ops import experts
from veneer.ops.experts import Stack, routed

E, D, W, T, K, R = 5, 6, 4, 7, 2, 3


def glu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def tensors(seed: int = 0, biases: bool = True):
    torch.manual_seed(seed)

    def draw(*shape, trained=False):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=trained)

    x, weights = draw(T, D, trained=True), torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])  # the last expert gets nothing
    stacks = [
        Stack(
            draw(E, out, wide), draw(E, out) if biases else None, draw(E, R, wide, trained=True),
            draw(E, out, R, trained=True), 0.5,
        )
        for out, wide in ((2 * W, D), (D, W))
    ]  # fmt: skip
    return x, index, weights, stacks


def dense(x, index, weights, stacks):
    out = torch.zeros_like(x)
    for e in range(E):
        h = x
        for i, s in enumerate(stacks):
            h = F.linear(h, s.weight[e] + (0 if s.a is None else s.scaling * s.b[e] @ s.a[e]))
            h = h if s.bias is None else h + s.bias[e]
            h = glu(h) if i == 0 else h
        out = out + ((index == e) * weights).sum(1, keepdim=True) * h
    return out


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("branches", [(True, True), (True, False), (False, True), (False, False)])
def test_forward_and_gradients_equal_dense_deltas(biases: bool, branches: tuple[bool, bool]) -> None:
    x, index, weights, stacks = tensors(biases=biases)
    stacks = [s if has else s._replace(a=None, b=None) for s, has in zip(stacks, branches, strict=True)]
    trained = [x, weights, *(t for s in stacks for t in (s.a, s.b) if t is not None)]
    y, twin = routed(x, index, weights, *stacks, glu), dense(x, index, weights, stacks)
    assert torch.allclose(y, twin)
    with torch.no_grad():
        assert torch.allclose(routed(x, index, weights, *stacks, glu), twin)
    both = (torch.autograd.grad(t.square().sum(), trained) for t in (y, twin))
    assert all(torch.allclose(mine, other) for mine, other in zip(*both, strict=True))
    assert torch.autograd.gradcheck(lambda *_: routed(x, index, weights, *stacks, glu), trained)


@pytest.mark.parametrize("rank", [4, 3])
def test_one_call_for_all_experts_gives_what_a_loop_gives(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs))
    torch.manual_seed(1)
    x, weights = torch.randn(20, 8, requires_grad=True), torch.rand(20, 2)
    index = torch.stack([torch.randperm(E - 1)[:2] for _ in range(20)])  # the last expert gets nothing
    stacks, trained = [], [x]
    for out, wide in ((8, 8), (8, 4)):
        stored = torch.randn(out, rank * E, requires_grad=True)  # experts side by side, as LoRA's B has them
        a = torch.randn(E, rank, wide, requires_grad=True)
        trained += [a, stored]
        b = stored.view(out, rank, E).permute(2, 0, 1)
        stacks.append(Stack(torch.randn(E, out, wide), None, a, b, 0.5))
    y = routed(x, index, weights, *stacks, glu)
    mine = torch.autograd.grad(y.square().sum(), trained)
    assert len(calls) >= 8
    monkeypatch.setattr(experts, "_grouped", lambda *_: False)
    twin = routed(x, index, weights, *stacks, glu)
    assert torch.allclose(y, twin, atol=1e-4)
    other = torch.autograd.grad(twin.square().sum(), trained)
    assert all(torch.allclose(m, o, rtol=1e-4, atol=1e-2) for m, o in zip(mine, other, strict=True))


def test_only_what_trains_gets_a_gradient() -> None:
    x, index, weights, stacks = tensors()
    x, weights = x.detach(), weights.detach()
    stacks[0].a.requires_grad_(False)
    routed(x, index, weights, *stacks, glu).sum().backward()
    assert stacks[0].a.grad is None and all(t.grad is not None for t in (stacks[0].b, stacks[1].a, stacks[1].b))


SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 40,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(**SMALL, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}
TARGETS = {
    "both": ["experts.gate_up_proj", "experts.down_proj"],
    "first": ["experts.gate_up_proj"],
    "second": ["experts.down_proj"],
}  # fmt: skip


def adapted(name: str, targets: str) -> Tuner:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("_bias"):
            torch.nn.init.normal_(parameter)
    tuner = Tuner(model)
    tuner.add("a", LoraConfig(r=2, target_modules=[], target_parameters=TARGETS[targets], init_lora_weights=False))
    tuner.set_active("a")
    return tuner


class _Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.shapes |= {tuple(t.shape) for t in made if t.untyped_storage().data_ptr() not in given}
        return out


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_models_take_the_short_way_which_equals_the_long_one(name: str, targets: str, monkeypatch) -> None:
    tuner, ids = adapted(name, targets), torch.arange(6).view(2, 3)
    stack = next(iter(tuner.adapters("a")))[1].site.stored.shape

    def run() -> list[torch.Tensor]:
        tuner.zero_grad()
        embeds = torch.sin(torch.arange(6 * 16.0)).view(2, 3, 16).requires_grad_()
        y = tuner(inputs_embeds=embeds, use_cache=False).logits
        y.square().sum().backward()
        return [y, embeds.grad, *(p.grad.clone() for p in tuner.parameters() if p.grad is not None)]

    with _Largest() as seen:
        short = run()
        with torch.no_grad():
            tuner(input_ids=ids, use_cache=False)
    assert not any(
        len(shape) == 3 and shape[0] == stack[0] and set(shape[1:]) == set(stack[1:]) for shape in seen.shapes
    )
    monkeypatch.setattr(experts_path, "way", lambda *_: None)
    long = run()
    assert len(short) == len(long) == 2 + 2 * len(TARGETS[targets])
    for mine, twin in zip(short, long, strict=True):
        torch.testing.assert_close(mine, twin, atol=1e-4, rtol=1e-3)


def test_gains_several_adapters_and_routes_give_what_the_weights_give() -> None:
    tuner, ids = adapted("qwen3", "both"), torch.arange(6).view(2, 3)
    config = LoraConfig(r=3, target_modules=[], target_parameters=TARGETS["second"], init_lora_weights=False)
    tuner.add("b", config)
    outputs = {}
    for name in ("a", "b"):
        tuner.set_active(name)
        outputs[name] = tuner(input_ids=ids).logits
    tuner.route(["a", "b"])
    mixed = tuner(input_ids=ids).logits
    tuner.route(None)
    assert torch.allclose(mixed[0], outputs["a"][0], atol=1e-5) and torch.allclose(mixed[1], outputs["b"][1], atol=1e-5)
    tuner.set_active("a")
    tuner.state.gains = {"a": 0.0}
    gone = tuner(input_ids=ids).logits
    tuner.state.gains = {}
    with tuner.disabled():
        assert torch.allclose(tuner(input_ids=ids).logits, gone, atol=1e-5)
    merged = outputs["a"]
    tuner.merge("a")
    assert torch.allclose(tuner(input_ids=ids).logits, merged, atol=1e-5)
