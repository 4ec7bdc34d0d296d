"""The base's own tensors, read from and written into an adapted model under the names they had before."""

from __future__ import annotations

import pytest
import torch

from veneer import LoraConfig, get_peft_model
from veneer.hf.base_state import get_base_model_state_dict, set_base_model_state_dict

from .tiny import IDS, gpt2, llama


def adapted(base, **options):
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(base, LoraConfig(**settings)).eval()


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("merged", [False, True])
def test_it_is_the_state_before_adapting(base, merged) -> None:
    before = {key: value.clone() for key, value in base().state_dict().items()}
    model = adapted(base(), modules_to_save=["lm_head"] if base is llama else None)
    if merged:
        model.merge_adapter()
    found = get_base_model_state_dict(model)
    assert list(found) == list(before)
    assert all(torch.equal(found[key], before[key]) for key in before)


def test_a_start_that_changes_the_base_is_put_aside() -> None:
    before = llama().state_dict()
    found = get_base_model_state_dict(adapted(llama(), init_lora_weights="pissa"))
    assert all(torch.equal(found[key], before[key]) for key in before)


def test_it_goes_back_in() -> None:
    other = llama(hidden_act="silu")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model = adapted(llama())
    assert set_base_model_state_dict(model, other.state_dict()) == ([], [])
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = adapted(llama())
    y = model(IDS).logits
    state = {key: value + 1 for key, value in llama().state_dict().items()}
    state["model.layers.0.self_attn.q_prj.weight"] = state.pop("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(RuntimeError, match=r"1 keys are missing.*q_prj\.weight' looks like 'model.*q_proj\.weight'"):
        set_base_model_state_dict(model, state)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' has shape \(2,\)"):
        set_base_model_state_dict(model, {"lm_head.weight": torch.zeros(2)}, strict=False)
    assert torch.equal(model(IDS).logits, y)
    keys = set_base_model_state_dict(model, {}, strict=False)
    assert len(keys.missing_keys) == len(state) and keys.unexpected_keys == []
