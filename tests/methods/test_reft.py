"""ReFT: its edits, its positions, and what generation leaves alone."""

from __future__ import annotations

import pytest
import torch

from hf.tiny import gpt2, llama
from parity import randomise
from veneer import PeftModel, ReftConfig, get_peft_model

IDS = torch.tensor([[1, 4, 5, 6, 7, 8], [1, 9, 10, 11, 12, 13]])
LEFT = torch.tensor([[1, 4, 5, 6, 7, 8], [0, 0, 1, 9, 10, 11]])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def made(build=llama, size=0.5, **kwargs):
    torch.manual_seed(1)
    model = get_peft_model(build(), ReftConfig(**({"r": 3, "task_type": "CAUSAL_LM"} | kwargs))).eval()
    randomise([p for p in model.parameters() if p.requires_grad], size=size)
    return model


def state(model, **given):
    """What the one edited block gives."""
    caught = []
    hook = model.base_model.hosts()[0].register_forward_hook(lambda module, args, output: caught.append(output))
    model(**given)
    hook.remove()
    return caught[0][0] if isinstance(caught[0], tuple) else caught[0]


def edited(positions, given=None, **kwargs):
    """(rows, tokens) of the first block's output that differ from the base's."""
    given = given or {"input_ids": IDS}
    model = made(positions=positions, target_modules=["layers.0"], **kwargs)
    found = state(model, **given)
    with model.disable_adapter():
        return (found - state(model, **given)).abs().amax(-1) > 0


def test_chosen_positions_alone_change():
    assert edited("f2+l1")[0].tolist() == [True, True, False, False, False, True]
    assert edited("l2", tied=False)[0].tolist() == [False] * 4 + [True] * 2
    assert edited("all").all()
    rows = edited("f1+l1", {"input_ids": LEFT, "attention_mask": MASK})
    assert rows[1].tolist() == [False, False, True, False, False, True]
    labels = torch.where(torch.arange(6) < 4, -100, IDS)  # two tokens of an answer
    assert edited("f1+l1", {"input_ids": IDS, "labels": labels})[0].tolist() == [True, False, False, True, False, False]
    assert edited("f4+l4", {"input_ids": IDS}).all()


@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_the_edit_is_the_formula(variant):
    model = made(variant=variant, target_modules=["layers.0"], positions="all")
    edit = model.base_model.hosts()[0].adapters["default"].edit
    given = {"input_ids": IDS}
    found = state(model, **given)
    with model.disable_adapter():
        h = state(model, **given)
    if variant == "loreft":
        R = edit.R
        assert torch.allclose(R @ R.T, torch.eye(3), atol=1e-5)
        expected = h + (h @ edit.reft_W.T + edit.reft_b - h @ R.T) @ R
    else:
        expected = h + (h @ edit.reft_W.T + edit.reft_b) @ edit.reft_R
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("variant", ["loreft", "direft"])
def test_it_starts_as_the_base_learns_and_saves(variant, build, tmp_path):
    expected = build()(IDS).logits
    model = made(build, variant=variant, tied=False, size=0)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)


def test_generated_tokens_are_left_alone():
    model = made(positions="f1+l1")
    found = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    labels = torch.full((2, 9), -100)  # whole forwards, told what the prompt is
    for step in range(4):
        length = 6 + step
        own = labels[:, :length].clone()
        own[:, 6:] = 1
        y = model(found[:, :length], labels=own).logits[:, -1]
        assert torch.equal(y.argmax(-1), found[:, length])


def test_refusals():
    for wrong, words in (
        ({"positions": "first"}, "positions must be like"),
        ({"variant": "noreft"}, "'loreft' or 'direft'"),
        ({"r": 99}, "exceeds the width 16"),
        ({"r": 0}, "`r` should be a positive"),
    ):
        with pytest.raises(ValueError, match=words):
            made(**wrong)
