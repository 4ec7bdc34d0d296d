"""Prompt tuning: its starts, and parity with the peer."""

from __future__ import annotations

import pytest
import torch

from hf.tiny import llama, tokenizer
from parity import needs_peer
from prompt_parity import BASES, both_ways
from veneer import PeftModel, PromptTuningConfig, PromptTuningInit, get_peft_model
from veneer.engine.tuner import Tuner


def start(length=5, **kwargs):
    return get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **kwargs))


def rows(model):
    return model.base_model.prompts["default"].prompt_embeddings


@needs_peer
@pytest.mark.parametrize("base", BASES)
def test_parity(base, tmp_path):
    both_ways(base, "PromptTuningConfig", tmp_path, num_virtual_tokens=3)


def test_a_text_starts_it_repeated_and_cut(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    settings = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": str(tmp_path)}
    model = start(5, prompt_tuning_init_text="a b c", **settings)
    embeddings = model.get_base_model().get_input_embeddings().weight
    ids = tokenizer()("a b c")["input_ids"]
    assert torch.equal(rows(model), embeddings[(ids * 2)[:5]])
    assert torch.equal(rows(start(2, prompt_tuning_init_text="a b c", **settings)), embeddings[ids[:2]])
    text = torch.tensor([[1, 9, 10]])  # such a prompt is the text itself
    assert torch.allclose(
        model(text).logits, model.get_base_model()(torch.cat([torch.tensor([(ids * 2)[:5]]), text], 1)).logits
    )


def test_sampled_rows_are_rows_of_the_vocabulary_and_random_ones_have_their_size():
    model = start(prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB)
    table = model.get_base_model().get_input_embeddings().weight
    assert all((table == row).all(1).any() for row in rows(model))
    assert 0.5 < float(rows(start(40)).std() / table.std()) < 2


def test_a_saved_prompt_needs_no_tokenizer(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = start(
        prompt_tuning_init="TEXT", prompt_tuning_init_text="a b", tokenizer_name_or_path=str(tmp_path / "tokenizer")
    )
    model.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(rows(again), rows(model))
    assert again.peft_config["default"].prompt_tuning_init_text == "a b"


def test_a_prompt_of_another_model_is_refused(tmp_path):
    start().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="token_dim=16, but LlamaForCausalLM has 24"):
        PeftModel.from_pretrained(llama(hidden_size=24), tmp_path)


def test_bad_starts_are_refused(monkeypatch):
    for wrong, words in (
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}, "needs prompt_tuning_init_text"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}, "needs tokenizer_name_or_path"),
        ({"prompt_tuning_init": "WORDS"}, "must be one of TEXT, SAMPLE_VOCAB, RANDOM"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "for prompt_tuning_init='TEXT' alone"),
        (
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "/nowhere"},
            "tokenizer '/nowhere'.*cannot be loaded",
        ),
        (
            {
                "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "y",
                "tokenizer_kwargs": {"trust_remote_code": True},
            },
            "settings run no code",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            start(**wrong)
    monkeypatch.setattr("veneer.core.prompt.encode", None)
    config = PromptTuningConfig(
        num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="y"
    )
    with pytest.raises(ValueError, match="needs the tokenizer 'y'"):
        Tuner(llama()).add("default", config)
