"""CPT: its balls, its loss, and parity with the peer."""

from __future__ import annotations

import pytest
import torch

from hf.tiny import llama
from parity import needs_peer
from prompt_parity import both_ways
from veneer import CPTConfig, PeftModel, get_peft_model

IDS = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 11, 12]])
LABELS = torch.tensor([[-100, -100, 5, 6, 7], [-100, -100, 10, 11, 12]])
SETTINGS = {
    "num_virtual_tokens": 8, "cpt_token_ids": [3, 4, 5, 6, 7, 8, 9, 10], "cpt_mask": [1] * 8,
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
}  # fmt: skip
DECAY = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}


def made(**kwargs):
    return get_peft_model(llama(), CPTConfig(task_type="CAUSAL_LM", **(SETTINGS | kwargs)))


@needs_peer
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_parity(base, tmp_path):
    wide = {"opt_projection_epsilon": 30, "opt_projection_format_epsilon": 30}
    # Of a left-padded row, GPT-2 in the peer generates something else than of the row alone.
    both_ways(base, "CPTConfig", tmp_path, generates=base != "gpt2", **SETTINGS, **wide)


@needs_peer
@pytest.mark.parametrize("weights", [{}, DECAY])
@pytest.mark.parametrize("types", [None, [1, 2, 3, 4, 4], [0, 0, 4, 4, 4]])
def test_the_loss_is_the_peers(weights, types):
    import peft

    theirs = peft.get_peft_model(llama(), peft.CPTConfig(task_type="CAUSAL_LM", **SETTINGS, **weights))
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}
    mask = {} if types is None else {"input_type_mask": torch.tensor([types] * 2)}
    ours = made(**weights)(**given, **mask).loss  # the peer changes the mask it is given
    assert torch.allclose(ours, theirs(**given, **mask).loss, atol=1e-6)


def test_the_start_is_in_context_prompting():
    model = made().eval()
    context = torch.tensor([SETTINGS["cpt_token_ids"]]).expand(2, -1)
    expected = model.get_base_model()(torch.cat([context, IDS], 1)).logits
    assert torch.allclose(model(IDS).logits, expected, atol=1e-6)


def test_rows_stay_in_their_balls_and_labels_where_they_are(tmp_path):
    model = made(opt_projection_epsilon=0.2)
    own = model.base_model.prompts["default"]
    centre = own.prompt_embeddings.detach().clone()
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=LABELS).loss.backward()
        assert not own.prompt_embeddings.grad[[3, 7]].any() and own.prompt_embeddings.grad[[0, 1, 2]].any(1).all()
        optimizer.step()
    model.eval()(IDS)
    moved = (own.prompt_embeddings - centre).norm(dim=1)
    radius = torch.tensor([0.1, 0.2, 0.1, 0.0] * 2) * (16 / 2048) ** 0.5
    assert torch.allclose(moved, radius, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    again.train()(IDS)  # the centre of a resumed run is the context still
    assert torch.allclose(again.base_model.prompts["default"].prompt_embeddings, own.prompt_embeddings, atol=1e-6)


def test_refusals():
    for wrong, words in (
        ({"cpt_token_ids": [1, 2]}, "cpt_token_ids must have num_virtual_tokens=8 entries"),
        ({"cpt_tokens_type_mask": None}, "cpt_tokens_type_mask must have"),
        ({"opt_weighted_loss_type": "linear"}, "'none' or 'decay'"),
    ):
        with pytest.raises(ValueError, match=words):
            made(**wrong)
    with pytest.raises(ValueError, match="CAUSAL_LM"):
        get_peft_model(llama(), CPTConfig(task_type="SEQ_CLS", **SETTINGS))
