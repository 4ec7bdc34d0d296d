"""What the status says of layers and models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model

from .tiny import IDS, llama


def adapted(**options):
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | options
    return get_peft_model(llama(), LoraConfig(**settings))


def test_a_layer_says_what_is_on_it() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    layers = {layer.name: layer for layer in model.get_layer_status()}
    q = layers["model.model.layers.0.self_attn.q_proj"]
    assert q.module_type == "lora.Linear"
    assert q.enabled and q.active_adapters == ["default"] and q.merged_adapters == []
    assert q.available_adapters == ["default", "other"]
    assert q.requires_grad == {"default": True, "other": False}
    assert q.devices == {"default": ["cpu"], "other": ["cpu"]}
    assert layers["model.model.layers.0.self_attn.v_proj"].available_adapters == ["other"]
    assert len(layers) == 4


def test_the_model_sums_up() -> None:
    model = adapted(modules_to_save=["lm_head"])
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "LoraModel")
    assert status.peft_types == {"default": "LORA"}
    assert status.num_adapter_layers == 3
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.requires_grad == {"default": True} and status.enabled is True
    assert {layer.module_type for layer in model.get_layer_status()} == {"lora.Linear", "ModulesToSaveWrapper"}


def test_it_follows_what_is_done_to_the_model() -> None:
    model = adapted()
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True
    model.set_requires_grad("default", False)
    assert model.get_model_status().requires_grad == {"default": False}
    assert model.get_model_status().trainable_params == 0


def test_what_layers_do_not_agree_on_is_irregular() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.requires_grad_(False)
    assert model.get_model_status().requires_grad == {"default": "irregular"}
    layer.merge()
    assert model.get_model_status().merged_adapters == "irregular"


def test_devices_are_those_of_the_tensors() -> None:
    model = adapted()
    model.base_model.model.model.layers[1].self_attn.q_proj.adapters["default"].to("meta")
    assert model.get_model_status().devices == {"default": ["cpu", "meta"]}


def test_models_that_adapters_were_injected_into() -> None:
    model = llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    assert get_layer_status(model)[0].name == "model.layers.0.self_attn.q_proj"
    assert get_model_status(model).peft_types == {"default": "LORA"}


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"):
        get_layer_status(llama())
    with pytest.raises(ValueError, match="has no adapters"):
        get_model_status(nn.Linear(2, 2))


def test_a_deep_copy_reports_on_itself() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    model.merge_adapter()
    assert twin.get_model_status().merged_adapters == []
    assert torch.equal(twin(IDS).logits, twin(IDS).logits)


def test_nothing_in_a_hot_path_walks_the_model(monkeypatch) -> None:
    """Entering ``disable_adapter`` (once a reference pass in reinforcement learning) costs no walk over all modules."""
    model = adapted()
    monkeypatch.setattr(nn.Module, "named_modules", lambda *a, **k: pytest.fail("walked the model"))
    with model.disable_adapter():
        pass
    assert model.active_adapters == ["default"]
