"""LLaMA-Adapter: its formula, its zero start, and parity with the peer."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf.tiny import gpt2, llama, t5
from parity import both_ways, needs_peer, randomise
from veneer import AdaptionPromptConfig, get_peft_model

IDS = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 11, 12]])
SIZES = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES)).eval()


def qwen():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).eval()


def gqa():
    return llama(num_attention_heads=4, num_key_value_heads=2)


BASES = {
    "llama": llama,
    "gqa": lambda: llama(num_attention_heads=4, num_key_value_heads=2),
    "mistral": mistral,
    "gpt2": gpt2,
}
FIELDS = {"adapter_len": 3, "adapter_layers": 1, "task_type": "CAUSAL_LM"}


@needs_peer
@pytest.mark.parametrize("base", BASES)
def test_parity(base, tmp_path):
    import peft

    target = "attn" if base == "gpt2" else "self_attn"
    config = AdaptionPromptConfig(target_modules=target, **FIELDS)
    both_ways(BASES[base], peft.AdaptionPromptConfig(**FIELDS), config, {"input_ids": IDS}, tmp_path, size=0.5)


@pytest.mark.parametrize("base", [*BASES, "qwen"])
def test_the_start_is_the_base_and_the_top_layers_learn(base):
    build = (BASES | {"qwen": qwen})[base]
    config = AdaptionPromptConfig(target_modules="self_attn" if base == "qwen" else None, **FIELDS)
    model = get_peft_model(build(), config)
    assert torch.equal(model(IDS).logits, build()(IDS).logits)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 and all(".1." in n for n in names)
    randomise([p for p in model.parameters() if p.requires_grad], size=0.5)
    y = model(IDS).logits
    assert not torch.allclose(y, build()(IDS).logits, atol=1e-4)
    y.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = IDS
    for _ in range(4):
        text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(model.generate(IDS, **greedy), text)


def test_it_is_attention_to_the_prompt_with_a_softmax_of_its_own():
    model = get_peft_model(llama(num_attention_heads=4, num_key_value_heads=2), AdaptionPromptConfig(**FIELDS)).double()
    host = next(iter(model.base_model.hosts()))
    adapter, m = host.adapters["default"], host.site.module
    with torch.no_grad():
        adapter.adaption_gate.fill_(0.7)
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    angle = torch.arange(3.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    angle = torch.cat([angle, angle], -1)[None]
    given = {"position_embeddings": (angle.cos(), angle.sin()), "attention_mask": None}
    expected = m(x, **given)[0].clone()
    for t in range(3):
        heads = []
        for h in range(4):
            q = (m.q_proj.weight @ x[0, t])[4 * h : 4 * h + 4]
            c, s = angle[0, t].cos(), angle[0, t].sin()
            q = torch.cat([q[:2] * c[:2] - q[2:] * s[:2], q[2:] * c[:2] + q[:2] * s[:2]])
            kv = slice(4 * (h // 2), 4 * (h // 2) + 4)
            k, v = (adapter.adaption_prompt[0] @ w.weight[kv].T for w in (m.k_proj, m.v_proj))
            heads.append(0.7 * torch.softmax(k @ q / 2, 0) @ v)
        expected[0, t] += m.o_proj.weight @ torch.cat(heads)
    assert torch.allclose(host(x, **given)[0], expected, atol=1e-6)


def test_refusals():
    for wrong, words in (
        ({"adapter_len": None}, "adapter_len must be a positive integer"),
        ({"adapter_layers": 5}, "has 2 attention modules"),
    ):
        with pytest.raises(ValueError, match=words):
            get_peft_model(llama(), AdaptionPromptConfig(**(FIELDS | wrong)))
    with pytest.raises(ValueError, match=r"T5Attention.*are not known to it"):
        get_peft_model(t5(), AdaptionPromptConfig(target_modules="SelfAttention", **FIELDS))
    model = get_peft_model(llama(), AdaptionPromptConfig(**FIELDS))
    with pytest.raises(ValueError, match="merge"):
        model.merge_and_unload()
