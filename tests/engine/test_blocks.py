"""Layers that run together give what they give one by one, keep less, say when they do not, and leave no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BartConfig, BartModel, GemmaConfig, LlamaConfig, Phi3Config

from veneer import LoraConfig
from veneer.engine import blocks
from veneer.engine.tuner import Tuner

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 40, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(config=None, targets=tuple(ALL), dtype=torch.float32, **options) -> Tuner:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or LlamaConfig(**SMALL)).to(dtype)
    tuner = Tuner(model)
    tuner.add("a", LoraConfig(**({"r": 2, "target_modules": list(targets), "init_lora_weights": False} | options)))
    tuner.set_active("a")
    return tuner


def results(tuner: Tuner) -> tuple[list[torch.Tensor], int]:
    """Logits and gradients, and the bytes kept for backward."""
    tuner.zero_grad()
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(3)
    embeds = torch.sin(torch.arange(2 * 9 * 16.0)).view(2, 9, 16).to(tuner.model.dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = tuner(inputs_embeds=embeds, use_cache=False).logits
    kept_bytes = sum(kept.values())
    y.float().square().sum().backward()
    grads = [p.grad.clone() for p in tuner.parameters() if p.grad is not None]
    return [y.detach(), embeds.grad, *grads], kept_bytes


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), GemmaConfig(**SMALL), LlamaConfig(**SMALL, mlp_bias=True)])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"r": 3, "rank_pattern": {"k_proj": 1, "up_proj": 2}}])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "k_proj", "v_proj", "up_proj"]])
def test_outputs_and_gradients_are_those_of_the_layers_one_by_one(config, options: dict, targets: list[str]) -> None:
    tuner = adapted(config, targets, **options)
    together, kept = results(tuner)
    said = blocks.report(tuner.model)
    assert set(said.values()) == {"joined"} and len(said) == 2 * 2
    tuner.state.joins = False
    apart, more = results(tuner)
    assert set(blocks.report(tuner.model).values()) == {"switched off"}
    assert len(together) == len(apart) and kept < more
    for mine, twin in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, twin, atol=1e-5, rtol=1e-4)


def test_layers_with_one_input_drop_the_same_entries() -> None:
    tuner = adapted(lora_dropout=0.5).train()
    first, again = results(tuner)[0], results(tuner)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    q, k, v = (tuner.model.model.layers[0].self_attn._modules[n] for n in ("q_proj", "k_proj", "v_proj"))
    with torch.no_grad():
        for host in (q, k, v):
            host.base_layer.weight.zero_()
        for host in (k, v):
            host.adapters["a"].lora_A.weight.copy_(q.adapters["a"].lora_A.weight)
            host.adapters["a"].lora_B.weight.copy_(q.adapters["a"].lora_B.weight[:8])
    x = torch.randn(2, 5, 16, requires_grad=True)
    ys = [host(x) for host in (q, k, v)]
    assert torch.allclose(ys[0][..., :8], ys[1], atol=1e-5) and torch.allclose(ys[1], ys[2], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"use_dora": True}])
def test_checkpointed_gradients_are_the_same(options: dict) -> None:
    tuner = adapted(**options).train()
    plain, _ = results(tuner)
    tuner.model.gradient_checkpointing_enable({"use_reentrant": False})
    again, _ = results(tuner)
    for mine, twin in zip(plain, again, strict=True):
        torch.testing.assert_close(mine, twin, atol=1e-6, rtol=1e-5)


def test_what_is_in_the_way_is_said_and_the_result_is_the_same() -> None:
    tuner = adapted()
    attention, mlp = tuner.model.model.layers[0].self_attn, tuner.model.model.layers[0].mlp
    expected, _ = results(tuner)
    calls: list[int] = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in (attention.k_proj, mlp.up_proj.base_layer)]
    seen, _ = results(tuner)
    said = blocks.report(tuner.model)
    assert said["model.layers.0.self_attn"] == said["model.layers.0.mlp"] == "a layer is hooked" and len(calls) == 2
    assert said["model.layers.1.mlp"] == "joined"
    for handle in handles:
        handle.remove()
    tuner.add("b", LoraConfig(r=2, target_modules=["k_proj", "up_proj"]))
    tuner.set_active("a", "b")
    assert "several adapters" in blocks.report(tuner.model)["model.layers.0.mlp"]
    both, _ = results(tuner)
    for mine, twin, third in zip(expected[:2], seen[:2], both[:2], strict=True):
        torch.testing.assert_close(mine, twin)
        torch.testing.assert_close(mine, third)
    with tuner.disabled():
        tuner(input_ids=torch.tensor([[1, 2]]))


def test_another_input_gets_its_own_output() -> None:
    tuner = adapted()
    attention = tuner.model.model.layers[0].self_attn
    x, other = torch.randn(1, 3, 16, requires_grad=True), torch.randn(1, 3, 16, requires_grad=True)
    expected = [attention._modules[name](x.detach()) for name in ("k_proj", "v_proj")]
    elsewhere = attention.k_proj(other.detach())
    attention.q_proj(x)
    assert torch.allclose(attention.k_proj(other), elsewhere, atol=1e-6)
    attention.q_proj(x)
    with torch.no_grad():
        x.mul_(2)  # what was made ready is not this x's any more
    assert torch.allclose(attention.v_proj(x), 2 * expected[1], atol=1e-6)


def test_attention_over_something_else_is_not_grouped() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, max_position_embeddings=20,
    )  # fmt: skip
    tuner = Tuner(BartModel(config))
    tuner.add("a", LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    assert all(host.group is None for host in tuner.hosts())


def test_a_fused_projection_is_no_gated_block() -> None:
    tuner = adapted(Phi3Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}), ["gate_up_proj", "down_proj"])
    assert results(tuner)[0] and not blocks.report(tuner.model)


def test_a_removed_adapter_takes_its_blocks_along() -> None:
    tuner = adapted()
    before = set(tuner.model.model.layers[0].mlp.__dict__)
    tuner.add("b", LoraConfig(r=2, target_modules=["q_proj"]))
    tuner.delete("a")
    assert not blocks.report(tuner.model)
    model = tuner.unload()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert "forward" in before


def test_copies_and_pickles_run_on_their_own() -> None:
    tuner = adapted()
    expected, _ = results(tuner)
    for twin in (copy.deepcopy(tuner), pickle.loads(pickle.dumps(tuner))):
        assert blocks.report(twin.model) == blocks.report(tuner.model)
        assert twin.model.model.layers[0].mlp.forward.__self__ is twin.model.model.layers[0].mlp
        found, _ = results(twin)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


class Gated(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.one, self.two, self.three, self.act = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6), act

    def forward(self, x):
        return self.three(self.two(x) * self.act(self.one(x)))


class Doubled(Gated):
    def forward(self, x):
        return self.three(self.act(self.one(x)) * self.two(2 * x))


@pytest.mark.parametrize(("kind", "joins"), [(Gated, True), (Doubled, False)])
def test_a_block_is_known_by_what_it_computes_not_by_names(kind, joins: bool) -> None:
    tuner = Tuner(nn.Sequential(kind(nn.GELU())))
    tuner.add("a", LoraConfig(r=2, target_modules=["one", "two", "three"], init_lora_weights=False))
    tuner.set_active("a")
    x = torch.randn(4, 6, requires_grad=True)
    y = tuner(x)
    assert bool(blocks.report(tuner.model)) == joins and ("Gated" in type(y.grad_fn).__name__) == joins
    tuner.state.joins = False
    assert torch.allclose(tuner(x), y, atol=1e-6)
