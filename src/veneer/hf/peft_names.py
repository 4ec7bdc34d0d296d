"""Where veneer has what ``peft`` and its sub-modules offer: data for ``veneer.hf.as_peft``.

A name means the same in every sub-module, as it does in the peer, but for the few that are a method's own (``Linear``
of ``peft.tuners.lora.layer`` is not that of ``peft.tuners.ia3.layer``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from veneer.core import registry
from veneer.hf import peft_inner

METHODS = {
    "adalora": "ADALORA", "adamss": "ADAMSS", "adaption_prompt": "ADAPTION_PROMPT", "beft": "BEFT", "boft": "BOFT",
    "c3a": "C3A", "cartridge": "CARTRIDGE", "cpt": "CPT", "deft": "DEFT", "delora": "DELORA", "fourierft": "FOURIERFT",
    "frod": "FROD", "glora": "GLORA", "gralora": "GRALORA", "hira": "HIRA", "hra": "HRA", "ia3": "IA3", "lily": "LILY",
    "ln_tuning": "LN_TUNING", "loha": "LOHA", "lokr": "LOKR", "lora": "LORA", "miss": "MISS",
    "multitask_prompt_tuning": "MULTITASK_PROMPT_TUNING", "oft": "OFT", "osf": "OSF", "p_tuning": "P_TUNING",
    "peanut": "PEANUT", "poly": "POLY", "prefix_tuning": "PREFIX_TUNING", "prompt_tuning": "PROMPT_TUNING",
    "psoft": "PSOFT", "pvera": "PVERA", "randlora": "RANDLORA", "road": "ROAD", "shadow": "SHADOW", "shira": "SHIRA",
    "supertuning": "SUPERTUNING", "tinylora": "TINYLORA", "trainable_tokens": "TRAINABLE_TOKENS", "unilora": "UNILORA",
    "vblora": "VBLORA", "vera": "VERA", "waveft": "WAVEFT", "xlora": "XLORA",
}  # fmt: skip
"""Folder of a method below ``peft.tuners`` -> its ``peft_type``."""

MODULES = frozenset(
    {
        "peft", "peft.auto", "peft.config", "peft.functional", "peft.helpers", "peft.import_utils", "peft.mapping",
        "peft.mapping_func", "peft.mixed_model", "peft.optimizers", "peft.optimizers.loraplus",
        "peft.optimizers.lorafa", "peft.optimizers.riemannian", "peft.peft_model", "peft.tuners",
        "peft.tuners.tuners_utils",
        "peft.tuners.lycoris_utils", "peft.tuners._buffer_dict", "peft.tuners.mixed", "peft.tuners.mixed.model",
        "peft.tuners.lora.conversion", "peft.tuners.lora.corda", "peft.tuners.lora.dora", "peft.tuners.lora.eva",
        "peft.tuners.lora.arrow", "peft.tuners.lora.loraga", "peft.tuners.lora.intruders", "peft.tuners.lora.variants",
        "peft.tuners.lora.bnb", "peft.tuners.lora.gptq", "peft.tuners.lora.awq", "peft.tuners.lora.aqlm",
        "peft.tuners.lora.hqq", "peft.tuners.lora.eetq", "peft.tuners.lora.torchao", "peft.tuners.lora.tp_layer",
        "peft.utils", "peft.utils.constants", "peft.utils.error", "peft.utils.hotswap", "peft.utils.incremental_pca",
        "peft.utils.integrations", "peft.utils.loftq_utils", "peft.utils.merge_utils", "peft.utils.other",
        "peft.utils.peft_types", "peft.utils.quantization_utils", "peft.utils.save_and_load",
        "peft.utils.transformers_weight_conversion", "peft.utils.warning",
        *peft_inner.MODULES,
        *(f"peft.tuners.{m}{part}" for m in METHODS for part in ("", ".config", ".layer", ".model")),
    }
)  # fmt: skip

HOMES = {
    "veneer.core.config": ["PeftConfig", "TaskType", "CONFIG_NAME", "PeftConfigMixin=PeftConfig"],
    "veneer.core.errors": ["NoMatchingPeftModuleError", "PeftError", "PeftWarning"],
    "veneer.core.registry": ["PeftType"],
    "veneer.engine.checkpoint": ["WEIGHTS_NAME=BIN_NAME", "SAFETENSORS_WEIGHTS_NAME=SAFE_NAME"],
    "veneer.engine.targets": ["INCLUDE_LINEAR_LAYERS_SHORTHAND=ALL_LINEAR"],
    "veneer.hf.base_state": ["get_base_model_state_dict", "set_base_model_state_dict"],
    "veneer.hf.convert": ["convert_to_lora", "reduce_intruder_dimension", "save_as_lora"],
    "veneer.hf.faces": [
        "AuxiliaryTrainingWrapper", "BaseTunerLayer", "LoraLayer", "LycorisLayer", "ModulesToSaveWrapper",
        "TrainableTokensWrapper",
    ],
    "veneer.hf.hotswap": [
        "CONFIG_KEYS_TO_CHECK=KEYS_TO_CHECK", "check_hotswap_configs_compatible", "hotswap_adapter",
        "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap",
    ],
    "veneer.hf.incremental_pca": ["IncrementalPCA"],
    "veneer.hf.peer_finding": [
        "_find_minimal_target_modules=find_minimal_target_modules", "_get_in_out_features=get_in_out_features",
        "_get_input_embeddings_name=get_input_embeddings_name",
        "_get_module_names_tied_with_embedding=names_tied_with_embedding", "_get_no_split_modules=get_no_split_modules",
        "_get_submodules=get_submodules", "_get_submodules_with_grandparent=get_submodules_with_grandparent",
        "_is_valid_match=is_valid_match", "_maybe_include_all_linear_layers=include_all_linear_layers",
        "check_target_module_exists", "find_parameter_name_by_module", "get_pattern_key", "inspect_matched_modules",
        "match_target_against_key",
    ],
    "veneer.hf.peer_internals": [
        "BufferDict", "DoraCaching", "MontecloraTrainerMixin", "check_adapters_to_merge",
        "check_deepspeed_zero3_enabled", "clone_module", "dequantize_module_weight", "factorization",
        "gather_params_ctx", "get_device_map", "get_layer_device_map", "get_quantization_config", "id_tensor_storage",
        "init_empty_weights", "make_kron", "map_cache_to_layer_device_map", "skip_init_on_device", "str_to_bool",
        "torch_load", "bloom_model_postprocess_past_key_value=postprocess_past_key_value",
        "starcoder_model_postprocess_past_key_value=postprocess_past_key_value", "_get_batch_size=get_batch_size",
        "_insert_adapter_name_into_state_dict=insert_adapter_name", "random_mask", "replicate_layers", "onload_layer",
        "forward_fn_dict", "prepare_layer_inputs_fn_language_modeling", "prepare_model_inputs_fn_language_modeling",
        "get_default_import_allowlist", "check_import_allowlist", "check_file_exists_on_hf_hub",
    ],
    "veneer.hf.peer_merge": [
        "calculate_majority_sign_mask", "dare_linear", "dare_ties", "disjoint_merge", "magnitude_based_pruning",
        "magnitude_prune", "prune", "random_pruning", "reshape_weight_task_tensors", "task_arithmetic", "ties",
    ],
    "veneer.hf.mixed": ["PeftMixedModel", "_check_config_compatible=refuse_layerless"],
    "veneer.hf.peer": [
        "build_peft_weight_mapping", "cast_adapter_dtype", "cast_mixed_precision_params", "check_if_peft_model",
        "convert_peft_config_for_transformers", "delete_adapter", "disable_input_dtype_casting",
        "fsdp_auto_wrap_policy", "infer_device", "prepare_model_for_kbit_training", "register_peft_method",
        "rescale_adapter_scale", "set_adapter", "_set_adapter=set_adapter", "set_requires_grad", "shift_tokens_right",
        "transpose", "update_forward_signature", "update_generate_signature", "update_signature",
        "_freeze_adapter=freeze_adapter",
    ],
    "veneer.hf.status": ["TunerLayerStatus", "TunerModelStatus"],
    "veneer.hf.tasks": ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING=TASK_CLASSES"],
    "veneer.hf.tuner": ["BaseTuner=PeftTuner", "LycorisTuner=PeftTuner", "MixedModel=PeftTuner"],
}  # fmt: skip
"""Module of veneer -> the peer's names it holds, ``theirs=ours`` where ours is another. All that ``veneer`` itself
exports is found besides."""

WHERE = {name.partition("=")[0]: (home, name.rpartition("=")[2]) for home, names in HOMES.items() for name in names}

CONSTANTS: dict[str, Any] = {
    "__version__": None,
    "DUMMY_MODEL_CONFIG": {"model_type": "custom"},
    "DUMMY_TARGET_MODULES": "dummy-target-modules",
    "EMBEDDING_LAYER_NAMES": ["embed_tokens", "lm_head"],
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION": 20,
    "SEQ_CLS_HEAD_NAMES": ["score", "classifier"],
    "TOKENIZER_CONFIG_NAME": "tokenizer_config.json",
    **peft_inner.CONSTANTS,
}
KINDS = {
    "Linear": ("linear", "conv1d_hf"), "Conv1d": ("conv",), "Conv2d": ("conv",), "Conv3d": ("conv",),
    "_ConvNd": ("conv",), "Embedding": ("embedding",), "ParamWrapper": ("parameter",),
    "MultiheadAttention": ("parameter",),
}  # fmt: skip
"""Layer class of a method's ``layer`` module -> the kinds of sites it stands for."""


def find(module: str, name: str) -> Any:
    """The object that ``name`` means in ``module``.

    Raises:
        LookupError: nothing that veneer has.
    """
    own = module.split(".")
    if own[:2] == ["peft", "tuners"] and len(own) > 2 and own[2] in METHODS:
        found = _of_method(METHODS[own[2]], name)
        if found is not None:
            return found
    if name in PROMPT_ENCODERS:
        return _rows()[PROMPT_ENCODERS[name]].build
    if name in CONSTANTS:
        return CONSTANTS[name]
    if name in WHERE:
        home, ours = WHERE[name]
        return getattr(importlib.import_module(home), ours)
    if name in TABLES:
        return TABLES[name]()
    if name.startswith("is_") and name.endswith("_available"):
        return functools.partial(_available, name[3 : -len("_available")])
    if name.endswith("Layer") and (peft_type := _type_called(name.removesuffix("Layer"))) is not None:
        return _layer_face(name, peft_type, None)
    if name.startswith("TRANSFORMERS_MODELS_TO_"):
        return _default_targets(name.removeprefix("TRANSFORMERS_MODELS_TO_"))
    if name in ("ALLOWED_COMPUTE_DTYPES", "ALL_LAYERNORM_LAYERS"):
        return _of_torch(name)
    try:
        return getattr(importlib.import_module("veneer"), name)
    except AttributeError:
        pass
    try:
        return _not_built(name)
    except LookupError:
        return peft_inner.stand_in(name, module)


def _of_torch(name: str) -> Any:
    import torch

    if name == "ALLOWED_COMPUTE_DTYPES":
        return torch.float16, torch.bfloat16, torch.float32
    return [torch.nn.LayerNorm]


PROMPT_ENCODERS = {
    "CPTEmbedding": "CPT", "CartridgeEncoder": "CARTRIDGE", "MultitaskPromptEmbedding": "MULTITASK_PROMPT_TUNING",
    "PrefixEncoder": "PREFIX_TUNING", "PromptEmbedding": "PROMPT_TUNING",
}  # fmt: skip
"""The peer's name of a prompt's module -> its ``peft_type``."""


@functools.cache
def _not_built(name: str) -> type:
    """A stand-in for a class of a method that veneer does not have yet: libraries import such names and never use them.

    Raises:
        LookupError: no name of the peer's methods.
    """
    if name == "PromptLearningConfig":
        from veneer.hf import faces

        return faces.face(name, "Any config of a prompt.", lambda c: getattr(c, "is_prompt_learning", False))
    stem = name.removesuffix("Config").removesuffix("Model")
    if stem == name or (stem not in PROMPTS and _type_called(stem) is None):
        raise LookupError(name)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} belongs to a method that is not built into veneer.")

    return type(name, (), {"__init__": refuse, "__doc__": "A method that is not built in.", "__module__": __name__})


PROMPTS = ("CPT", "Cartridge", "MultitaskPromptTuning", "PrefixTuning", "PromptEncoder", "PromptTuning")
"""What the names of the prompt methods' configs begin with."""


def _default_targets(what: str) -> dict[str, Any]:
    """One of the tables from ``model_type`` to the modules that a method adapts by default."""
    from veneer.hf import architecture_table as table
    from veneer.hf.architectures import default_targets

    if what == "IA3_FEEDFORWARD_MODULES_MAPPING":
        return dict(table.IA3_FEEDFORWARD)
    stem = what.removesuffix("_TARGET_MODULES_MAPPING")
    if what == "PREFIX_TUNING_POSTPROCESS_MAPPING":  # a cache of keys and values is every family's here
        return {}
    peft_type = next((t for t in METHODS.values() if t.replace("_", "") == stem.replace("_", "")), None)
    if stem == what or peft_type is None:
        raise LookupError(what)
    families = {*table.ATTENTION, *table.OTHERWISE.get(peft_type, {}), *table.NORMS}
    pairs = {family: default_targets(peft_type, family) for family in sorted(families)}
    return {family: targets for family, targets in pairs.items() if targets is not None}


def _of_method(peft_type: str, name: str) -> Any:
    if name in KINDS or any(name.endswith(kind) for kind in ("Linear", "Conv2d", "Linear4bit", "Linear8bitLt")):
        kind = next((k for k in KINDS if name.endswith(k)), "Linear")
        return _layer_face(name, peft_type, KINDS[kind])
    return None


@functools.cache
def _layer_face(name: str, peft_type: str, kinds: tuple[str, ...] | None) -> type:
    from veneer.hf import faces

    if name == "LoraLayer":
        return faces.LoraLayer
    return faces.face(name, f"A layer with a {peft_type} adapter.", faces.holding(peft_type, kinds or ()))


def _type_called(stem: str) -> str | None:
    """The ``peft_type`` whose classes are called ``<stem>Config``, ``<stem>Model``, ``<stem>Layer``."""
    from veneer.hf.tuner import TUNER_NAMES

    return next((t for t, name in TUNER_NAMES.items() if name == f"{stem}Model"), None)


_MODULE_OF = {"bnb": "bitsandbytes", "gptqmodel": "gptqmodel", "te": "transformer_engine", "inc": "neural_compressor"}


def _available(library: str, *args: Any, **kwargs: Any) -> bool:
    """Whether the library that ``is_<library>_available`` asks about is installed."""
    import torch

    stem = library.removesuffix("_4bit").removesuffix("_pytorch").removeprefix("torch_")
    if stem in ("xpu", "tpu"):
        return stem == "xpu" and torch.xpu.is_available()
    return importlib.util.find_spec(_MODULE_OF.get(stem, stem)) is not None


def _rows() -> dict[Any, registry.Method]:
    importlib.import_module("veneer.methods")
    return {row.peft_type: row for row in registry.METHODS.values()}


def _configs() -> dict[Any, type]:
    return {peft_type: row.config for peft_type, row in _rows().items()}


def _tuners() -> dict[Any, type]:
    from veneer.core.prompt import Prompt
    from veneer.hf.tuner import tuner_class

    return {t: row.build if issubclass(row.build, Prompt) else tuner_class(str(t)) for t, row in _rows().items()}


def _prefixes() -> dict[Any, str]:
    from veneer.hf.tuner import parameter_prefix

    return {t: parameter_prefix(str(t)) for t in _rows()}


TABLES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": _configs,
    "PEFT_TYPE_TO_TUNER_MAPPING": _tuners,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": _tuners,
    "PEFT_TYPE_TO_PREFIX_MAPPING": _prefixes,
}


def public() -> list[str]:
    """``peft.__all__``: what ``from peft import *`` gives."""
    import veneer
    from veneer.hf.tuner import TUNER_NAMES

    methods = [row.config.__name__ for row in _rows().values()] + [TUNER_NAMES[t] for t in _rows() if t in TUNER_NAMES]
    ours = [name for name in dir(veneer) if name not in ("Any", "annotations", "importlib", "install_as_peft")]
    return sorted({n for n in (*WHERE, *TABLES, *CONSTANTS, *methods, *ours) if not n.startswith("_")})
