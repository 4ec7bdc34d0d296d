"""aLoRA: acts from the last invocation on, row by row, also while a cache grows; parity with the peer."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parity import both_ways, call, near, needs_peer, ours
from veneer import LoraConfig
from veneer.engine.tuner import Tuner


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return LlamaForCausalLM(settings()).state_dict()


def settings() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip


def base() -> LlamaForCausalLM:
    model = LlamaForCausalLM(settings())
    model.load_state_dict(weights())
    return model.eval()


def config(**more) -> LoraConfig:
    own = {"target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
    return LoraConfig(**({"r": 4} | own | more))


IDS = torch.tensor([
    [1, 2, 7, 8, 3, 4, 5, 6],
    [7, 8, 3, 7, 8, 4, 5, 6],
    [1, 2, 3, 4, 5, 6, 7, 9],
    [1, 2, 3, 4, 5, 6, 7, 8],
])  # fmt: skip
STARTS = [2, 3, 8, 6]


def test_acts_from_the_last_invocation_on() -> None:
    plain = base()(IDS).logits
    tuner = ours(base(), config(), size=0.5)
    logits = tuner(input_ids=IDS).logits
    everywhere = ours(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), size=0.5)(IDS).logits
    for row, start in enumerate(STARTS):
        assert near(logits[row, :start], plain[row, :start], 1e-5)
        if start < 8:
            assert not near(logits[row, start:], plain[row, start:], 1e-3)
            assert not near(logits[row], everywhere[row], 1e-3)


def test_the_effect_lasts_while_the_cache_grows() -> None:
    tuner = ours(base(), config(), size=0.5)
    whole = tuner(input_ids=IDS).logits
    for cut in (1, 3, 5, 7):
        first = tuner(input_ids=IDS[:, :cut], use_cache=True)
        # A piece is looked at by itself: left out are invocations that the cut runs through, and a first one of two.
        rows = [r for r, s in enumerate(STARTS) if not s < cut < s + 2 and (r, cut) != (1, 3)]
        second = tuner(input_ids=IDS[:, cut:], past_key_values=first.past_key_values, use_cache=True)
        assert near(second.logits[rows], whole[rows, cut:], 1e-4)
    fresh = tuner(input_ids=IDS[2:3]).logits
    assert near(fresh, base()(IDS[2:3]).logits, 1e-5)  # a new call forgets


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "lm_head"]], ids=str)
def test_generate_equals_the_uncached_rollout(targets: list[str]) -> None:
    tuner = ours(base(), config(target_modules=targets), size=0.5)
    prompt = IDS[:1, :5]
    made = tuner.model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = prompt
    for _ in range(made.shape[1] - prompt.shape[1]):
        ids = torch.cat([ids, tuner(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def test_rows_of_a_mixed_batch_have_their_own_offsets() -> None:
    tuner = ours(base(), config(), size=0.5)
    tuner.add("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    alone = tuner(input_ids=IDS).logits
    tuner.set_active("other")
    other = tuner(input_ids=IDS).logits
    tuner.route(["other", "default", "__base__", "default"])
    mixed = tuner(input_ids=IDS).logits
    for row, expected in enumerate([other, alone, base()(IDS).logits, alone]):
        assert near(mixed[row], expected[row], 1e-5)


def test_it_needs_tokens_and_does_not_merge() -> None:
    tuner = ours(base(), config())
    with pytest.raises(ValueError, match="input_ids"):
        tuner(inputs_embeds=torch.randn(1, 4, 16))
    with pytest.raises(ValueError, match="cannot be merged"):
        tuner.merge()
    with pytest.raises(ValueError, match="exclude it"):
        Tuner(base()).add("a", LoraConfig(target_modules=["embed_tokens"], alora_invocation_tokens=[1]))


@needs_peer
def test_parity(tmp_path) -> None:
    import peft

    theirs = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM"
    )
    both_ways(base, theirs, config(), {"input_ids": IDS}, tmp_path, size=0.5)
    assert call(base(), {"input_ids": IDS}).shape == (4, 8, 32)
