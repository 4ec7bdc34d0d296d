"""What programs that import ``peft`` find when veneer answers to the name. Run by ``test_as_peft`` in its own process:

python -m veneer.as_peft -m pytest tests/hf/under_peft.py
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import json
import pickle

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoModelForCausalLM

import veneer

from .tiny import IDS, llama

SURFACE = {
    "peft": (
        "LoraConfig LoKrConfig PeftConfig PeftMixedModel PeftModel PeftType PrefixTuningConfig PromptLearningConfig "
        "TaskType get_peft_model get_peft_model_state_dict inject_adapter_in_model prepare_model_for_kbit_training "
        "set_peft_model_state_dict"
    ),
    "peft.functional": "delete_adapter set_adapter set_requires_grad",
    "peft.helpers": "disable_input_dtype_casting rescale_adapter_scale check_if_peft_model",
    "peft.tuners.loha.layer": "LoHaLayer",
    "peft.tuners.lokr.layer": "LoKrLayer",
    "peft.tuners.lora": "LoraConfig LoraLayer LoraModel Linear",
    "peft.tuners.lora.layer": "LoraLayer Linear Embedding Conv2d ParamWrapper",
    "peft.tuners.tuners_utils": "BaseTuner BaseTunerLayer check_target_module_exists",
    "peft.utils": "ModulesToSaveWrapper TaskType _get_submodules get_peft_model_state_dict",
    "peft.utils.other": "AuxiliaryTrainingWrapper ModulesToSaveWrapper fsdp_auto_wrap_policy",
    "peft.utils.save_and_load": "get_peft_model_state_dict load_peft_weights set_peft_model_state_dict",
    "peft.utils.constants": "CONFIG_NAME SAFETENSORS_WEIGHTS_NAME TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "peft.mapping": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING",
    "peft.peft_model": "PeftModelForCausalLM TunerLayerStatus",
    "peft.utils.transformers_weight_conversion": "build_peft_weight_mapping",
    "peft.import_utils": "is_bnb_available is_bnb_4bit_available",
}


def adapted(**options) -> PeftModel:
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()


def layers_of(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


# ---- the name -----------------------------------------------------------------------------------------------------
def test_the_name_means_veneer() -> None:
    assert peft.LoraConfig is veneer.LoraConfig
    assert peft.PeftModel is veneer.PeftModel
    assert peft.__version__ == importlib.metadata.version("peft") == "0.21.2"
    assert importlib.metadata.metadata("peft")["Name"] == "peft"
    assert importlib.util.find_spec("peft") is not None
    assert importlib.util.find_spec("peft.utils.other") is not None
    assert "peft" in importlib.metadata.packages_distributions()["peft"]


@pytest.mark.parametrize("module", SURFACE)
def test_what_other_libraries_import_is_there(module) -> None:
    found = importlib.import_module(module)
    assert [name for name in SURFACE[module].split() if not hasattr(found, name)] == []


def test_one_object_under_all_its_names() -> None:
    from peft.tuners.lora.config import LoraConfig as a
    from peft.tuners.lora.layer import LoraLayer as b
    from peft.utils.peft_types import PeftType

    assert a is LoraConfig and b is LoraLayer
    assert PeftType.LORA.value == "LORA" and peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is peft.LoraModel


def test_import_star() -> None:
    names: dict = {}
    exec("from peft import *", names)
    assert {"LoraConfig", "LoraModel", "get_peft_model", "PeftModelForSeq2SeqLM", "TaskType"} <= set(names)


def test_what_is_not_there_is_said_in_a_sentence() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r"veneer, which answers for peft here, has no module 'peft\.nonsense'"
    ):
        importlib.import_module("peft.nonsense")
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec("from peft.utils import Nonsense", {})
    with pytest.raises(AttributeError, match=r"has no 'Nonsense' in peft\.utils"):
        _ = peft.utils.Nonsense


def test_a_method_that_is_not_built_can_be_imported_but_not_used() -> None:
    from veneer.hf import peft_names

    stand_in = peft_names._not_built("AdaptionPromptConfig")
    with pytest.raises(NotImplementedError, match="AdaptionPromptConfig belongs to a method"):
        stand_in(adapter_len=3)


# ---- classes --------------------------------------------------------------------------------------------------------
def test_layers_are_what_they_hold() -> None:
    from peft.tuners.ia3.layer import IA3Layer
    from peft.tuners.lora.layer import Embedding, Linear

    model = adapted(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    inner = model.get_base_model()
    q, table, head = inner.model.layers[0].self_attn.q_proj, inner.model.embed_tokens, inner.lm_head
    assert isinstance(q, LoraLayer) and isinstance(q, BaseTunerLayer) and isinstance(q, Linear)
    assert isinstance(table, LoraLayer) and isinstance(table, Embedding) and not isinstance(table, Linear)
    assert isinstance(head, ModulesToSaveWrapper) and isinstance(head, AuxiliaryTrainingWrapper)
    assert not isinstance(head, BaseTunerLayer) and not isinstance(q, AuxiliaryTrainingWrapper)
    assert not isinstance(q, IA3Layer)
    assert not isinstance(nn.Linear(2, 2), BaseTunerLayer) and not isinstance("q", LoraLayer)
    assert isinstance(model.base_model, BaseTuner) and isinstance(model.base_model, peft.LoraModel)
    assert isinstance(model, (peft.PeftModel, peft.PeftMixedModel))
    assert head.modules_to_save["default"].weight.requires_grad and not head.original_module.weight.requires_grad
    assert not hasattr(q, "modules_to_save")


# ---- what strangers do with a layer -------------------------------------------------------------------------------
def test_reads() -> None:
    layer = adapted().get_base_model().model.layers[0].self_attn.q_proj
    assert layer.r == {"default": 2} and layer.lora_alpha == {"default": 8}
    assert layer.scaling["default"] == 4.0 and dict(layer.scaling) == {"default": 4.0}
    assert layer.lora_A["default"].weight.shape == (2, 16)
    assert layer.lora_A.default is layer.lora_A["default"]
    assert layer.active_adapters == ["default"] and layer.active_adapter == ["default"]
    assert layer.merged is False and layer.merged_adapters == [] and layer.disable_adapters is False
    assert layer.in_features == 16 and layer.weight is layer.get_base_layer().weight
    assert {"lora_A", "lora_B"} <= set(layer.adapter_layer_names)
    assert {"r", "scaling"} <= set(layer.other_param_names)


def test_parameter_names_that_others_look_for() -> None:
    model = adapted()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".default." in name and model.prefix in name for name in names)
    assert any(name.endswith("q_proj.base_layer.weight") for name, _ in model.named_parameters())


def test_delta_and_merge_by_layer() -> None:
    model = adapted()
    y = model(IDS).logits
    for layer in layers_of(model):
        before = layer.get_base_layer().weight.clone()
        delta = layer.get_delta_weight("default")
        layer.merge(safe_merge=True, adapter_names=["default"])
        assert layer.merged and layer.merged_adapters == ["default"]
        assert torch.allclose(layer.get_base_layer().weight - before, delta, atol=1e-6)
    assert torch.allclose(model(IDS).logits, y, atol=1e-5)
    assert model.base_model.merged == ("default",)  # the model knows what was done to its layers
    for layer in layers_of(model):
        layer.unmerge()
    assert torch.equal(model(IDS).logits, y)
    assert model.base_model.merged == ()


def test_strength_by_layer() -> None:
    model = adapted()
    y, off = model(IDS).logits, logits_off(model)
    for layer in layers_of(model):
        layer.set_scale("default", 0.0)
    assert torch.allclose(model(IDS).logits, off, atol=1e-6)
    for layer in layers_of(model):
        layer.unscale_layer()
    assert torch.equal(model(IDS).logits, y)
    for layer in layers_of(model):
        layer.scale_layer(2.0)
        assert layer.scaling["default"] == 8.0
    doubled = model(IDS).logits
    for layer in layers_of(model):
        layer.unscale_layer(2.0)
        layer.scaling["default"] *= 2
    assert torch.equal(model(IDS).logits, doubled) and not torch.equal(doubled, y)
    for layer in layers_of(model):
        layer.scaling["default"] = 4.0
    assert torch.equal(model(IDS).logits, y)


def logits_off(model) -> torch.Tensor:
    with model.disable_adapter():
        return model(IDS).logits


def test_a_scaled_merge_is_the_scaled_forward() -> None:
    model = adapted()
    for layer in layers_of(model):
        layer.scale_layer(0.5)
    y = model(IDS).logits
    model.merge_adapter()
    assert torch.allclose(model(IDS).logits, y, atol=1e-5)


def test_rescaling_for_a_while() -> None:
    from peft.helpers import rescale_adapter_scale

    model = adapted()
    y, off = model(IDS).logits, logits_off(model)
    with pytest.raises(RuntimeError), rescale_adapter_scale(model, 0.0):
        assert torch.allclose(model(IDS).logits, off, atol=1e-6)
        raise RuntimeError
    assert torch.equal(model(IDS).logits, y)
    with pytest.raises(ValueError, match="nothing to rescale"), rescale_adapter_scale(llama(), 2.0):
        pass


def test_choosing_by_layer() -> None:
    model = adapted()
    y = model(IDS).logits
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for layer in layers_of(model):
        layer.set_adapter(["other"])
    other = model(IDS).logits
    assert model.active_adapters == ["other"] and not torch.equal(other, y)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    for layer in layers_of(model):
        layer.enable_adapters(False)
    assert all(layer.disable_adapters for layer in layers_of(model))
    assert torch.equal(model(IDS).logits, logits_off(model))
    for layer in layers_of(model):
        layer.enable_adapters(True)
    assert torch.equal(model(IDS).logits, other)
    for layer in layers_of(model):
        layer.set_adapter("default", inference_mode=True)
    assert torch.equal(model(IDS).logits, y)
    assert not any(p.requires_grad for p in model.parameters())


def test_deleting_by_layer_deletes_from_the_model() -> None:
    model = adapted()
    y = model(IDS).logits
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    for layer in layers_of(model):
        layer.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IDS).logits, y)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))


def test_a_copy_of_a_layer_is_light_and_a_copy_of_the_model_is_its_own() -> None:
    model = adapted()
    layer = layers_of(model)[0]
    assert len(pickle.dumps(copy.deepcopy(layer))) < len(pickle.dumps(model)) / 4
    twin = copy.deepcopy(model)
    y = model(IDS).logits
    layers_of(twin)[0].delete_adapter("default")
    layers_of(twin)[1].set_scale("default", 0.0)
    assert torch.equal(model(IDS).logits, y)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS).logits, y)


def test_functions_over_injected_models() -> None:
    from peft.functional import delete_adapter, set_adapter, set_requires_grad

    model = llama()
    off = model(IDS).logits
    for name in ("a", "b"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model, name)
    set_adapter(model, "b")
    assert layers_of(model)[0].active_adapters == ["b"]
    set_requires_grad(model, "b", False)
    assert not any(p.requires_grad for p in model.parameters())
    delete_adapter(model, "b", prefix="lora_")
    delete_adapter(model, "a", prefix="lora_")
    assert torch.equal(model(IDS).logits, off)


# ---- transformers' own adapters -------------------------------------------------------------------------------------
def test_transformers_own_adapter_methods(tmp_path) -> None:
    model = llama()
    off = model(IDS).logits
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="a")
    a = model(IDS).logits
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), adapter_name="b")
    model.set_adapter("b")
    assert model.active_adapters() == ["b"] and not torch.equal(model(IDS).logits, a)
    model.set_adapter("a")
    assert torch.equal(model(IDS).logits, a)
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, off)
    model.enable_adapters()
    assert torch.equal(model(IDS).logits, a)
    found = model.get_adapter_state_dict("a")
    assert set(found) == {f"model.layers.{i}.self_attn.q_proj.lora_{m}.weight" for i in (0, 1) for m in "AB"}
    model.delete_adapter("b")
    assert list(model.peft_config) == ["a"]
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)  # the tensors must come out of the file, not out of the same draws
    fresh = llama()
    torch.manual_seed(2)
    fresh.load_adapter(str(tmp_path), adapter_name="c")
    assert torch.equal(fresh.eval()(IDS).logits, a)


def test_a_base_and_its_adapter_by_the_adapters_folder(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-6)


# ---- functions ------------------------------------------------------------------------------------------------------
def test_preparing_a_quantised_base() -> None:
    model = llama().to(torch.bfloat16)
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_small_functions() -> None:
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import _get_submodules, shift_tokens_right, transpose

    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], exclude_modules=["model.layers.3.q_proj"])
    assert check_target_module_exists(config, "model.layers.1.q_proj")
    assert not check_target_module_exists(config, "model.layers.0.q_proj")
    assert check_target_module_exists(LoraConfig(target_modules=r".*\.v"), "a.v")
    model = llama()
    parent, target, name = _get_submodules(model, "model.layers.0.mlp.up_proj")
    assert parent is model.model.layers[0].mlp and target is parent.up_proj and name == "up_proj"
    assert shift_tokens_right(torch.tensor([[5, -100, 6]]), 0, 9).tolist() == [[9, 5, 0]]
    assert transpose(torch.zeros(2, 3), True).shape == (3, 2)
    assert "LlamaForCausalLM" not in peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert "q_proj" in peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]


def test_signatures_are_shown() -> None:
    import inspect

    from peft.helpers import update_signature

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    y = model(IDS).logits
    update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert torch.equal(model(IDS).logits, y)
    with pytest.raises(ValueError, match="must be one of forward, generate, all"):
        update_signature(model, "backward")


def test_a_tuner_written_for_the_peer_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="one Adapter class"):
        peft.utils.register_peft_method(name="x", config_cls=LoraConfig, model_cls=BaseTuner)
