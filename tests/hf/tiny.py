"""Tiny models for the tests of ``veneer.hf``."""

from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijkl"]


def llama(layers: int = 2, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **(settings | kwargs))).eval()


def gpt2(**kwargs) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**(settings | kwargs))).eval()


def t5(**kwargs) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
        "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0,
    }  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**(settings | kwargs))).eval()


def tokenizer(extra: tuple[str, ...] = ()):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: i for i, word in enumerate([*VOCABULARY, *extra])}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


IDS = torch.tensor([[1, 4, 5, 6, 7, 8], [1, 9, 10, 11, 12, 2]])
