"""P-tuning: parity with the peer, and the encoder that is saved as well."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hf.tiny import llama
from parity import needs_peer
from prompt_parity import both_ways
from veneer import PeftModel, PromptEncoderConfig, PromptEncoderReparameterizationType, get_peft_model

IDS = torch.tensor([[1, 4, 5, 6, 7]])
SETTINGS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "encoder_hidden_size": 8}


@needs_peer
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("base", ["llama", "t5", "classifier"])
def test_parity(base, kind, tmp_path):
    settings = {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "encoder_reparameterization_type": kind}
    both_ways(base, "PromptEncoderConfig", tmp_path, extra_keys=("encoder.",), **settings)


@needs_peer
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_encoder_is_the_peers(kind):
    import peft

    theirs = peft.PromptEncoderReparameterizationType(kind)
    encoder = peft.get_peft_model(
        llama(), peft.PromptEncoderConfig(encoder_reparameterization_type=theirs, **SETTINGS)
    ).prompt_encoder["default"]
    ours = get_peft_model(llama(), PromptEncoderConfig(encoder_reparameterization_type=kind, **SETTINGS))
    own = ours.base_model.prompts["default"]
    own.encoder.load_state_dict(encoder.state_dict())
    assert torch.allclose(own.table(), encoder(torch.arange(3)[None])[0], atol=1e-6)


def test_the_encoder_is_the_formula():
    model = get_peft_model(llama(), PromptEncoderConfig(**SETTINGS)).double()
    own = model.base_model.prompts["default"]
    tensors = dict(own.named_parameters())
    w = {k.removeprefix("encoder."): v for k, v in tensors.items()}
    h = w["embedding.weight"]
    for i in (0, 2):
        h = torch.relu(h @ w[f"mlp_head.{i}.weight"].T + w[f"mlp_head.{i}.bias"])
    assert torch.allclose(own.table(), h @ w["mlp_head.4.weight"].T + w["mlp_head.4.bias"], atol=1e-12)


def test_what_is_saved_is_without_dropout_and_twins_are_independent(tmp_path):
    config = PromptEncoderConfig(encoder_reparameterization_type="LSTM", encoder_dropout=0.5, **SETTINGS)
    model = get_peft_model(llama(), config).train()
    model.save_pretrained(tmp_path)
    assert model.base_model.prompts["default"].encoder.training
    again = PeftModel.from_pretrained(llama(), tmp_path)
    expected = model.eval()(IDS).logits
    assert torch.allclose(again(IDS).logits, expected, atol=1e-6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, expected)


def test_an_unknown_encoder_is_refused():
    assert PromptEncoderConfig(encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM)
    with pytest.raises(ValueError, match="must be MLP or LSTM, not 'GRU'"):
        PromptEncoderConfig(encoder_reparameterization_type="GRU")
