"""A tied parameter is in a state dict once, and comes back under all its names."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import LoraConfig, get_peft_model

from .tiny import IDS, gpt2, llama, t5


def adapted(base, **options):
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **options)).eval()


@pytest.mark.parametrize("base", [gpt2, t5], ids=["gpt2", "t5"])
def test_the_whole_state_goes_through_safetensors(base, tmp_path) -> None:
    model = adapted(base())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = adapted(base())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))  # strict
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if base is t5 else {})
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_every_parameter_is_there_once() -> None:
    model = adapted(gpt2())
    assert set(model.state_dict()) >= {name for name, _ in model.named_parameters()}
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_a_state_with_all_names_is_read_too() -> None:
    model = adapted(gpt2())
    everything = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(everything, strict=False)
    assert model.load_state_dict(everything, strict=False).unexpected_keys == []


def test_a_model_without_ties_keeps_every_name() -> None:
    model = adapted(llama())
    assert set(model.state_dict()) >= {name for name, _ in model.named_parameters(remove_duplicate=False)}


def test_a_missing_tensor_is_still_missing() -> None:
    model = adapted(gpt2())
    state = copy.copy(model.state_dict())
    del state["base_model.model.transformer.wte.weight"]
    with pytest.raises(RuntimeError, match="wte"):
        model.load_state_dict(state)


def test_a_parent_module_gets_all_names() -> None:
    """Inside another module the state dict is torch's own: its hooks and prefixes are not ours to change."""
    model = adapted(gpt2())
    keys = set(torch.nn.ModuleDict({"m": model}).state_dict())
    assert {"m.base_model.model.transformer.wte.weight", "m.base_model.model.lm_head.weight"} <= keys
