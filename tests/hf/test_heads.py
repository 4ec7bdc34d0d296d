"""Losses without logits: equal to the model's own under caps and scales; where a head does not allow it, a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from veneer import LoraConfig, get_peft_model
from veneer.hf import heads

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 40, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def model_of(config) -> torch.nn.Module:
    torch.manual_seed(0)
    targets = ["c_attn" if config.model_type == "gpt2" else "q_proj"]
    return get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=targets))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 40, (2, 9))
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    return ids, labels


CONFIGS = {
    "plain": (LlamaConfig(**SMALL), heads.Bend()),
    "capped": (Gemma2Config(**SMALL, final_logit_softcapping=0.5), heads.Bend(1.0, 0.5)),
    "divided": (GraniteConfig(**SMALL, logits_scaling=8.0), heads.Bend(0.125)),
    "multiplied": (CohereConfig(**SMALL, logit_scale=0.5), heads.Bend(0.5)),
    "tied": (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40), heads.Bend()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_label_log_probs_and_gradients_equal_the_models_own(name: str) -> None:
    config, bend = CONFIGS[name]
    model, (ids, labels) = model_of(config).eval(), batch()
    head = model.get_base_model().get_output_embeddings()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    for _ in range(2):  # the first call also learns what the model does to its logits
        model.zero_grad()
        log_p = heads.label_log_probs(model, labels, 9, input_ids=ids, use_cache=False)
        assert log_p is not None and "forward" not in head.__dict__
        (-log_p.sum()).backward()
    found = heads._KNOWN[head]
    assert isinstance(found, heads.Bend) and found.scale == bend.scale
    assert found.cap == pytest.approx(bend.cap) if bend.cap else found.cap is None
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    torch.testing.assert_close(-log_p.sum(), loss)
    twins = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(twins) == 2 * (1 if name == "tied" else 2)
    for mine, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(mine, twin, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target_modules": ["lm_head"]}, "its head is adapted"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "its head is adapted"),
    ],
)
def test_a_head_that_trains_is_left_to_the_plain_way(options: dict, reason: str) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), LoraConfig(r=2, **options))
    ids, labels = batch()
    assert heads.whole(model) == reason
    assert heads.label_log_probs(model, labels, input_ids=ids) is None


def test_a_model_that_does_something_else_to_its_logits_is_left_to_the_plain_way() -> None:
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).requires_grad_(False)
    plain = base.forward

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits[..., 3] = -1e9
        return out

    base.forward = forward
    ids, labels = batch()
    assert heads.whole(base) is None
    assert heads.label_log_probs(base, labels, 9, input_ids=ids) is None
    assert "no scale" in heads.whole(base) and "forward" not in base.lm_head.__dict__
