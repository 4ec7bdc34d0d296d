"""Layer replication: a deeper model from the same parameters, adapted and merged layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.hf.replicate import replicate

from .tiny import IDS, gpt2, llama, t5

RANGES = [[0, 2], [1, 3]]


def adapted(base, **options):
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    return get_peft_model(base, LoraConfig(layer_replication=RANGES, **settings)).eval()


def deep(base: nn.Module) -> nn.Module:
    """The same model out of copied layers, in the plainest way."""
    base = copy.deepcopy(base)
    layers = base.model.layers
    base.model.layers = nn.ModuleList(copy.deepcopy(layers[i]) for i in (0, 1, 1, 2))
    for i, layer in enumerate(base.model.layers):
        layer.self_attn.layer_idx = i
    base.config.num_hidden_layers = 4
    return base


def test_it_equals_copied_layers_and_costs_no_parameter() -> None:
    model = llama(3)
    expected = deep(model)(IDS).logits
    before = {id(p) for p in model.parameters()}
    replicate(model, RANGES)
    assert torch.equal(model(IDS).logits, expected)
    assert {id(p) for p in model.parameters()} == before


def test_gpt2_whose_lists_have_other_names() -> None:
    model = gpt2(n_layer=3)
    replicate(model, [[0, 3], [2, 3]])
    assert len(model.transformer.h) == 4 and model.config.num_hidden_layers == 4
    assert [block.attn.layer_idx for block in model.transformer.h] == [0, 1, 2, 3]
    assert model(IDS).logits.isfinite().all()


def test_generation_with_a_cache_equals_generation_without() -> None:
    model = adapted(llama(3))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))


def test_the_callers_config_is_left_alone_and_lists_follow() -> None:
    model = llama(3, layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4)
    config, before = model.config, model.config.to_dict()
    replicate(model, RANGES)
    assert config.to_dict() == before
    assert model.config is not config and model.model.config is model.config
    assert model.config.num_hidden_layers == 4
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_each_copy_has_its_own_adapter() -> None:
    model = adapted(llama(3))
    layers = model.get_base_model().model.layers
    weights = [layer.self_attn.q_proj.lora_A["default"].weight for layer in layers]
    assert len({id(w) for w in weights}) == 4
    assert layers[1].self_attn.q_proj.base_layer.weight is layers[2].self_attn.q_proj.base_layer.weight


def test_merging_touches_one_layer_each() -> None:
    model = adapted(llama(3))
    y = model(IDS).logits
    model.merge_adapter()
    assert torch.allclose(model(IDS).logits, y, atol=1e-6)
    layers = model.get_base_model().model.layers
    assert layers[1].mlp.down_proj.weight is not layers[2].mlp.down_proj.weight
    model.unmerge_adapter()
    assert layers[1].mlp.down_proj.weight is layers[2].mlp.down_proj.weight
    assert torch.equal(model(IDS).logits, y)


def test_a_merged_model_is_a_model_of_its_own(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(llama(3))
    y = model(IDS).logits
    merged = model.merge_and_unload()
    parameters = [id(p) for layer in merged.model.layers for p in layer.parameters()]
    assert len(set(parameters)) == len(parameters)
    merged.save_pretrained(tmp_path)  # transformers refuses to save layers that share parameters
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(again.model.layers) == 4
    assert torch.allclose(again(IDS).logits, y, atol=1e-6)


@pytest.mark.parametrize("how", ["unload", "delete"])
def test_taking_the_adapter_out_gives_the_model_back(how) -> None:
    base = llama(3)
    y, config = base(IDS).logits, base.config
    objects = [(name, id(p)) for name, p in base.named_parameters()]
    modules = [(name, id(m)) for name, m in base.named_modules()]
    model = adapted(base)
    model.unload() if how == "unload" else model.delete_adapter("default")
    assert [(name, id(p)) for name, p in base.named_parameters()] == objects
    assert [(name, id(m)) for name, m in base.named_modules()] == modules
    assert base.config is config and base.model.config is config
    assert torch.equal(base(IDS).logits, y)


def test_saving_records_the_ranges_and_loading_makes_the_layers(tmp_path) -> None:
    model = adapted(llama(3))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(3), tmp_path)
    assert len(again.get_base_model().model.layers) == 4
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_second_adapter_needs_the_same_layers() -> None:
    model = adapted(llama(3))
    model.add_adapter("same", LoraConfig(r=2, target_modules=["q_proj"], layer_replication=RANGES))
    with pytest.raises(ValueError, match=r"'plain' has layer_replication=None.*default"):
        model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"all adapters of one model need the same layers"):
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 3], [0, 3]]))
    assert list(model.peft_config) == ["default", "same"]


def test_a_refused_adapter_leaves_the_model_as_it_was() -> None:
    base = llama(3)
    with pytest.raises(ValueError, match="q_prj"):
        adapted(base, target_modules=["q_prj"])
    assert len(base.model.layers) == 3 and base.config.num_hidden_layers == 3


@pytest.mark.parametrize("ranges", [[[0, 4]], [[2, 2]], [[-1, 2]], [[0, 1, 2]]])
def test_ranges_that_do_not_fit_are_refused(ranges) -> None:
    model = llama(3)
    with pytest.raises(ValueError, match="half-open range"):
        replicate(model, ranges)
    assert len(model.model.layers) == 3


def test_models_whose_layers_cannot_be_told_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder\.block, decoder\.block"):
        replicate(t5(), [[0, 2], [1, 2]])
    with pytest.raises(ValueError, match="num_hidden_layers"):
        replicate(nn.Linear(2, 2), [[0, 1]])


def test_gradients_reach_every_adapter() -> None:
    model = adapted(llama(3)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(gradients) == 16 and all(g is not None and g.abs().sum() > 0 for g in gradients)
