"""Prefix tuning: parity with the peer, the projection, and what can have no prefix."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from hf.tiny import llama
from parity import near, needs_peer
from prompt_parity import BASES, both_ways
from veneer import PeftModel, PrefixTuningConfig, get_peft_model

IDS = torch.tensor([[1, 4, 5, 6, 7]])
SETTINGS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


@needs_peer
@pytest.mark.parametrize("base", BASES)
def test_parity(base, tmp_path):
    both_ways(base, "PrefixTuningConfig", tmp_path, num_virtual_tokens=3)


@needs_peer
@pytest.mark.parametrize("base", ["gqa", "t5"])
def test_parity_with_a_projection(base, tmp_path):
    settings = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}
    own, again = both_ways(base, "PrefixTuningConfig", tmp_path, extra_keys=("encoder.",), **settings)
    here, there = (dict(m.base_model.prompts["default"].named_parameters()) for m in (own, again))
    assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in here)
    assert set(here) >= {"encoder.embedding.weight", "encoder.transform.0.weight", "encoder.transform.2.bias"}


def test_training_resumes_where_it_stood(tmp_path):
    def step(model):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return model.eval()(IDS).logits

    model = get_peft_model(llama(), PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **SETTINGS))
    step(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(step(again), step(model))


def test_a_file_with_the_table_alone_trains_on(tmp_path):
    from veneer.engine import checkpoint

    model = get_peft_model(
        llama(), PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **SETTINGS)
    ).eval()
    model.save_pretrained(tmp_path)
    table = {"prompt_embeddings": checkpoint.read(tmp_path)["prompt_embeddings"]}
    checkpoint.write(tmp_path, table)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert near(again(IDS).logits, model(IDS).logits, 1e-6)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == ["prompt_encoder.default.prompt_embeddings"]
    again.save_pretrained(tmp_path / "again")
    assert set(checkpoint.read(tmp_path / "again")) == {"prompt_embeddings"}
    again.load_adapter(tmp_path / "again", "other")
    model.save_pretrained(tmp_path / "whole")  # and a file with both may follow
    again.load_adapter(tmp_path / "whole", "default")
    assert near(again(IDS).logits, model(IDS).logits, 1e-6)


def test_zero_start_has_the_prefix_take_attention_but_say_nothing():
    for projection in (False, True):
        config = PrefixTuningConfig(init_weights="zero", prefix_projection=projection, **SETTINGS)
        model = get_peft_model(llama(), config).eval()
        assert not model.base_model.prompts["default"].table().any()
        assert not torch.allclose(model(IDS).logits, llama()(IDS).logits, atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="init_weights must be None"):
        get_peft_model(llama(), PrefixTuningConfig(init_weights="ones", **SETTINGS))
    config = Qwen3NextConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["linear_attention", "full_attention"], num_experts=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=1,
    )  # fmt: skip
    with torch.device("meta"), pytest.raises(ValueError, match="linear_attention; use prompt tuning"):
        get_peft_model(Qwen3NextForCausalLM(config), PrefixTuningConfig(**SETTINGS))
