"""Folders that ``adapters`` 1.3.0 wrote (with transformers 4.57, beside which alone it installs), read and answered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from veneer import PeftModel
from veneer.hf.adapterhub import load_adapterhub

HERE = Path(__file__).parent / "adapterhub"
SIZES = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip
FOLDERS = [f"{base}_{kind}" for base in ("bert", "llama") for kind in ("double_seq_bn", "seq_bn", "par_bn")]


def base_of(name, head=False):
    weights = load_file(HERE / f"{name.partition('_')[0]}.safetensors")
    if name.startswith("bert"):
        config = BertConfig(max_position_embeddings=32, **SIZES)
        model = (BertForSequenceClassification if head else BertModel)(config)
        inner = model.bert if head else model
    else:
        model = (LlamaForCausalLM if head else LlamaModel)(LlamaConfig(num_key_value_heads=2, **SIZES))
        inner = model.model if head else model
    missing = inner.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in k or "inv_freq" in k for k in missing.missing_keys)
    return model.eval()


@pytest.mark.parametrize("name", FOLDERS)
def test_we_answer_as_the_library_did(name, tmp_path):
    expected = load_file(HERE / "outputs.safetensors")
    ids = expected["input_ids"]
    model = load_adapterhub(base_of(name), HERE / name)
    assert torch.allclose(model(ids).last_hidden_state, expected[name], atol=1e-6)
    assert not torch.allclose(base_of(name)(ids).last_hidden_state, expected[name], atol=1e-2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_of(name), tmp_path)
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)
    with model.disable_adapter():
        assert torch.equal(model(ids).last_hidden_state, base_of(name)(ids).last_hidden_state)
    headed = load_adapterhub(base_of(name, head=True), HERE / name)
    inner = headed.get_base_model().bert if name.startswith("bert") else headed.get_base_model().model
    assert torch.allclose(inner(ids).last_hidden_state, expected[name], atol=1e-6)


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        load_adapterhub(base_of("bert"), tmp_path)
    with pytest.raises(ValueError, match="has no place for"):
        load_adapterhub(base_of("llama"), HERE / "bert_seq_bn")
    shutil.copytree(HERE / "bert_seq_bn", tmp_path / "x")
    path = tmp_path / "x" / "adapter_config.json"
    whole = json.loads(path.read_text())
    for changed, words in (
        (whole["config"] | {"use_gating": True}, "does not have.*use_gating"),
        ({}, "no AdapterHub"),
    ):
        path.write_text(json.dumps(whole | {"config": changed}))
        with pytest.raises(ValueError, match=words):
            load_adapterhub(base_of("bert"), tmp_path / "x")
