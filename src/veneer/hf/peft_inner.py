"""What of the peer's inner workings is known by name alone: data for ``veneer.hf.peft_names``.

Programs import such names at their head and use them in one branch, or never. Here each is a stand-in: a class without
instances, or a function that says, when it is called, that the inside of the peer is not rebuilt.
"""

from __future__ import annotations

import functools
from typing import Any

_TEXT = """
ALoraLinearVariant AdamssAsaCallback AdaptedAttention AdaptedAttentionGPT ArrowLinearVariant ArrowLoraLinearLayer
BasePromptEncoder BdLoraLinearVariant BlockCircularConvolution Bnb4bitBackend Bnb8bitBackend BufferedMontecloraSampler
DetachedFluxShadowModel DetachedShadowModel DiffusionShadowBackend DoraConv1dLayer DoraConv1dVariant DoraConv2dLayer
DoraConv2dVariant DoraConv3dLayer DoraConv3dVariant DoraEmbeddingLayer DoraEmbeddingVariant DoraLinearLayer
DoraLinearVariant FastBlockDiag FlattenDims Flux2ShadowBackend ForwardOnlyQuantizationBackend GloraEmptyPath
GloraLoraPath GloraPath GloraScalarPath GloraVectorPath HadaWeight HadaWeightCP HashHook HqqBackend KasaLinearVariant
LoraEmbeddingATPHolder LoraFAOptimizer LoraVariant MiCAEmbeddingVariant MiCALinearVariant ModelTypeConfig
MontecloraLinearVariant MontecloraSampler MultiplicativeDropoutLayer OFTRotationModule OrthLayer PeftConcatenate
PermuteDims PolyRouter QALoraLinearVariant QuantizationBackend RankAllocator Router SVDHook ShadowCache ShadowCarrier
TeLinear TemperatureScaledSoftmax TorchaoBackend TpInfo UniqueBaseGrad VeloraFunction VeloraLinearVariant Wavelet
WaveletDetailTuple2d WaveletTensorTuple XLoraClassifier XLoraConv2dLayer XLoraEmbeddingLayer XLoraLinearLayer
_BaseAdaptedAttention _BaseAutoPeftModel _DoraConvNdLayer _DoraConvNdVariant _ExcludedModule _Hook _LoraFactorsProxy
_LoraParameterProxy _RiemannianPreconditioner _SafetensorLoader _SharedModuleProxy _TokenShadowBackbone
_TokenShadowConfig _adapter_names_pre_forward_hook _adjust_padding_at_reconstruction _alora_offsets_pre_forward_hook
_apply_road _as_wavelet _block_diag_3d _category_from_key _check_adapters_not_merged _check_and_remove_unused_kwargs
_check_axes_argument _check_if_tensor _check_lora_target_modules_mamba _check_same_device _check_same_device_dtype
_check_same_dtype _coeff_tree_map _collect_lora_pairs _compress_activations _construct_2d_filt
_convert_miss_module_to_lora _convert_module_to_lora _convert_peft_config_moe _convert_scalings_to_tensor
_convert_to_peft_serialized_keys _copy_flux_tensor _copy_grouped_conv2d_lora_a_weights _copy_grouped_rows
_copy_overlap _delete_auxiliary_adapter _extend_unique _filter_state_dict_by_key_prefixes
_filter_state_dict_for_adapter_name _find_cutoff_index _find_mismatched_keys _fold_axes
_get_adapter_state_dict_key_prefixes _get_backbone _get_commit_hash _get_decoder_layers _get_delta_weight _get_encoder
_get_eva_state_dict _get_filter_tensors _get_group_dim _get_hidden_size _get_layer_kv_target_shape _get_lora_subconfig
_get_padded_conv2d _get_padded_linear _get_return_dict_transformers_v4 _get_tp_info _get_transpose_order
_get_tuner_layer_class _get_tuner_state_dict_key_prefixes _init_on_device _is_adapter_key _is_dev_version
_is_diffusion_transformer _is_dtype_supported _is_key_under_prefixes _kaiming_init _kasa_layer_regularization_loss
_layer_index_from_key _load_adapter_into_lora_model _load_eva_state_dict _load_reduced_flux_state _loftq_init_new
_low_rank_decomposition _maybe_shard_state_dict_for_tp _normalize_layer_config _normalize_projection _outer
_pad_lora_weights _peft_key_to_original_key _pool_last_token _postprocess_coeffs _postprocess_tensor _prepare_cols
_prepare_model_for_gradient_checkpointing _prepare_prompt_learning_config _preprocess_coeffs _projection_from_weights
_reconstruct_activations _register_frozen_peft_weight _register_parameter_or_buffer
_remove_adapter_name_from_state_dict_key _remove_embed_tokens _replace_layer_number_by_wildcard
_reshape_to_grouped_subtokens _reshard_dtensor_values_for_load _resolve_adapter_source _resolve_string_target_modules
_select_layer_indices _sequence_classification_loss _set_config_attr _set_layer_requires_grad _set_trainable
_shifted_ce_loss _skip_init_on_device _swap_axes _to_legacy_past_key_values _undo_swap_axes _unfold_axes
_update_scaling _validate_lora_adapter_state_dict _wait_if_async _warn_once_about_module_hooks
add_lora_tp_hooks_dtensor cache_decorator calculate_alora_offsets check_loaded_lora_compatibility_arrow clustering_Z
convert_layers_to_xlora convert_peft_adapter_state_dict_for_transformers create_attention_mask decompose_weight_matrix
dequantize_bnb_weight dispatch_aqlm dispatch_awq dispatch_bnb_4bit dispatch_bnb_8bit dispatch_default dispatch_eetq
dispatch_gptq dispatch_hqq dispatch_inc dispatch_megatron dispatch_torchao dispatch_transformer_engine
dtensor_from_local_like ensure_adapters_target_linear_layers_only estimate_gradients find_equal_values
freeze_flux_stem_embeddings get_alora_offsets_for_forward get_alora_offsets_for_generate get_bnb_param_type
get_circulant_fast get_default_module_allowlist get_device_with_meta_params get_diffusion_shadow_backend
get_embedding_layer_name get_fbd_cuda get_gptqmodel_quant_linear get_model_device get_quantization_kwargs get_router
get_target_modules get_tp_plan_and_mesh get_trainable_subspaces gpt2_compute_query_states
has_valid_embedding_base_layer is_adaption_prompt_trainable is_alora_relevant_in_batch is_gptqmodel_awq_layer
is_gptqmodel_quant_linear is_torchao_ge_v0_18_0 llama_apply_rotary_pos_emb llama_compute_query_states
llama_rotate_half loftq_init make_weight make_weight_cp minimal_wavelet move_inputs_to_device patch_environment
prepare_config project_gradient_to_orthogonal_space quantization_extra_repr resolve_quantization_backend seg_locations
set_additional_trainable_modules slice_pca validate_pretrained_flux_shadow wavelist waverec2d
"""
NAMES = frozenset(_TEXT.split())
MODULES = (
    "peft.tuners.adalora.bnb", "peft.tuners.adalora.gptq", "peft.tuners.adamss.asa_callback",
    "peft.tuners.adamss.utils", "peft.tuners.adaption_prompt.utils", "peft.tuners.boft.fbd",
    "peft.tuners.c3a.utils", "peft.tuners.cartridge.utils", "peft.tuners.hira.bnb", "peft.tuners.ia3.bnb",
    "peft.tuners.lora.inc", "peft.tuners.lora.monteclora", "peft.tuners.lora.te", "peft.tuners.lora.velora",
    "peft.tuners.osf.utils", "peft.tuners.poly.router", "peft.tuners.pvera.bnb", "peft.tuners.randlora.bnb",
    "peft.tuners.road.bnb", "peft.tuners.shadow.diffusion_models", "peft.tuners.shadow.layers",
    "peft.tuners.shira.mask_functions", "peft.tuners.waveft.constants", "peft.tuners.waveft.wavelet",
    "peft.tuners.waveft.waverec2d", "peft.tuners.xlora.classifier",
)  # fmt: skip
"""Modules of the peer that hold little else."""

CONSTANTS: dict[str, Any] = {
    "COMPATIBLE_TUNER_TYPES": ("LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA"),
    "ENABLE_DORA_CACHING": False,
    "EPS": 1e-12,
    "GKS_ADAPTER_PREFIX": "gks_",
    "MIN_EXPECTED_CONFIG_KEYS": {"peft_type"},
    "PREFIXES": ["lora_", "lokr_", "hada_", "oft_", "shira_"],
    "TASK_ADAPTER_PREFIX": "task_",
    "TYPE_CHECKING": False,
    "UNSUPPORTED_LORA_MODULES": (),
    "UPCAST_DTYPES": ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    "VARIANT_KWARG_KEYS": ["alora_offsets"],
    "_FBD_CUDA": None,
    "_torch_supports_distributed": True,
    "_torch_supports_dtensor": True,
    "is_transformers_dtensor_tp": True,
    "is_transformers_le_4_53": False,
    "mlu_available": False,
    "warn_msg_weight_tying": "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter.",
}
"""Values that no installed library changes: veneer needs a transformers that is newer than all that is asked for."""


@functools.cache
def stand_in(name: str, module: str) -> Any:
    """A class or function that can be imported and not used.

    Raises:
        LookupError: no name of the peer's.
    """
    if name.startswith("is_transformers_ge_v5"):
        return True
    if name not in NAMES:
        raise LookupError(name)
    sentence = (
        f"{module}.{name} is a part of PEFT's inner workings, which veneer, answering to the name peft here, does not "
        "rebuild."
    )

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(sentence)

    if name.lstrip("_")[0].isupper():
        return type(name, (), {"__init__": refuse, "__doc__": sentence, "__module__": __name__})
    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = sentence
    return refuse
