"""The calculation of docs/scale.md, against a model of that size without its weights, and against the page."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LoraConfig, get_peft_model
from veneer.train import scale


def test_the_parameters_are_those_of_the_model_and_of_its_adapter():
    shape = scale.LLAMA_70B
    config = LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=shape.vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    assert sum(p.numel() for p in base.parameters()) == shape.parameters
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] == shape.adapter(16)


def test_the_page_says_what_is_calculated():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    for row in scale.table():
        assert row in page


def test_more_gpus_hold_less_and_one_sends_nothing():
    shape = scale.LLAMA_70B
    held = [scale.fsdp2(shape, 16, n).held for n in (1, 8, 64, 512)]
    assert held == sorted(held, reverse=True)
    for way in (scale.ddp, scale.fsdp2):
        alone = way(shape, 16, 1)
        assert alone.adapter_sent == alone.base_sent == 0
    assert scale.ddp(shape, 32, 8).adapter_sent == pytest.approx(2 * scale.ddp(shape, 16, 8).adapter_sent)
