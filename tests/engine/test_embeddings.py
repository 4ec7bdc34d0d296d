"""Embeddings that scale, pad or bound their rows."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import veneer
from veneer import LoraConfig
from veneer.engine.tuner import Tuner

IDS = torch.arange(1, 13).reshape(3, 4)


def gemma() -> nn.Module:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("options", [{}, {"trainable_token_indices": [3, 7]}])
def test_scaled_embeddings_equal_the_peer_and_merge(tmp_path, options: dict) -> None:
    targets = ["q_proj"] if options else ["embed_tokens", "q_proj"]
    config = {"r": 4, "target_modules": targets, "init_lora_weights": False} | options
    theirs = peft.get_peft_model(gemma(), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad and "tokens_delta" in name:
                p.add_(0.5)
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(gemma(), tmp_path)
    y = ours(input_ids=IDS).logits
    assert torch.allclose(y, theirs(input_ids=IDS).logits, atol=1e-5)
    assert torch.allclose(ours.merge_and_unload()(input_ids=IDS).logits, y, atol=1e-4)


def tuned(**options) -> Tuner:
    torch.manual_seed(0)
    tuner = Tuner(nn.Sequential(nn.Embedding(20, 8, **options), nn.Linear(8, 2)))
    tuner.add("a", LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    tuner.set_active("a")
    return tuner.eval()


def test_a_bound_on_row_norms_holds_for_the_base_and_refuses_merging() -> None:
    tuner = tuned(max_norm=0.5)
    host = tuner.hosts()[0]
    with tuner.disabled():
        assert (tuner.model[0](IDS).norm(dim=-1) <= 0.5 + 1e-5).all()
    y = tuner(IDS)
    with pytest.raises(ValueError, match="max_norm"):
        tuner.merge()
    assert torch.equal(tuner(IDS), y) and host.original is None


def test_the_padding_row_gets_no_gradient() -> None:
    tuner = tuned(padding_idx=5)
    tuner(IDS).sum().backward()
    grad = tuner.hosts()[0].adapters["a"].lora_embedding_A.grad
    assert grad[:, 5].abs().sum() == 0 and grad[:, 6].abs().sum() > 0
