"""veneer: parameter-efficient fine-tuning of large pretrained models on PyTorch.

Names are loaded when they are first used, so ``import veneer`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from veneer.core import files

__version__ = "0.1.0"

_HOMES = {
    "veneer.core.config": ["PeftConfig", "LayerConfig", "TaskType"],
    "veneer.core.nf4_linear": ["quantize_model"],
    "veneer.core.registry": ["PeftType"],
    "veneer.methods.lora_options": [
        "ArrowConfig", "BdLoraConfig", "CordaConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraGAConfig",
        "LoraRuntimeConfig", "MontecloraConfig", "VeloraConfig",
    ],
    "veneer.hf.tasks": [
        "PeftModel", "get_peft_config", "get_peft_model",
        "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
    ],
    "veneer.hf.state_dict": ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"],
    "veneer.hf.inject": ["inject_adapter_in_model"],
    "veneer.hf.adapterhub": ["load_adapterhub"],
    "veneer.hf.prefix_start": [
        "compose_cartridge_adapters", "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ],
    "veneer.hf.kappa": ["KappaTuneSelector", "find_kappa_target_modules"],
    "veneer.train.flat": ["FlatAdamW"],
    "veneer.train.optim": [
        "create_lorafa_optimizer", "create_loraplus_optimizer", "create_lorapro_optimizer",
        "create_riemannian_optimizer",
    ],
    "veneer.hf.initialize": ["initialize"],
    "veneer.hf.mixtures": ["create_arrow_model", "keep_experts", "mix"],
    "veneer.hf.pool": ["AdapterPool"],
    "veneer.hf.eva": ["get_eva_state_dict", "initialize_lora_eva_weights"],
    "veneer.hf.quantised_start": ["quantize_with_adapter"],
    "veneer.hf.preprocess": ["preprocess_corda", "preprocess_loraga", "replace_lora_weights_loftq"],
    "veneer.hf.status": ["get_layer_status", "get_model_status"],
    "veneer.hf.auto": [
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
    ],
    "veneer.hf.peer": ["cast_mixed_precision_params", "prepare_model_for_kbit_training", "rescale_adapter_scale"],
    "veneer.hf.packed_base": ["load_quantized", "save_quantized"],
    "veneer.hf.base_state": ["get_base_model_state_dict", "set_base_model_state_dict"],
    "veneer.hf.convert": ["convert_to_lora", "save_as_lora"],
    "veneer.hf.as_peft": ["install_as_peft"],
}  # fmt: skip
_WHERE = {name: home for home, names in _HOMES.items() for name in names}


def _download(repo: str, filename: str, **kwargs: Any) -> Path:
    """What ``PeftConfig.from_pretrained`` asks for a hub id; the hub's own code is loaded then."""
    return importlib.import_module("veneer.hf.hub").download(repo, filename, **kwargs)


files.resolver = _download


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'veneer' has no attribute '{name}'")
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    else:
        value = _of_a_method(name)
    globals()[name] = value
    return value


def _of_a_method(name: str) -> Any:
    """A config class, or ``<Method>Model``, of any method in the registry."""
    if not name[:1].isupper():
        raise AttributeError(f"module 'veneer' has no attribute '{name}'")
    importlib.import_module("veneer.methods")
    from veneer.core.registry import METHODS

    for row in METHODS.values():
        for cls in (row.config, row.build):
            if cls.__name__ == name:
                return cls
        module = importlib.import_module(row.config.__module__)
        if hasattr(module, name) and getattr(module, name).__module__.startswith("veneer."):
            return getattr(module, name)
    if name.endswith("Model"):
        return getattr(importlib.import_module("veneer.hf.tuner"), name)
    raise AttributeError(f"module 'veneer' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
