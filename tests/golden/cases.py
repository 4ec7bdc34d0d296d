"""The golden cases: a base model and the peer's config for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """One folder to make."""

    name: str
    base: str
    config: Callable[[Any], Any]
    """The peer's module -> the config."""
    second: Callable[[Any], Any] | None = None
    """A second adapter, called ``other``, saved in a sub-folder."""
    then: Callable[[nn.Module, dict], None] | None = None
    """What happens to the model and its inputs after its tensors are moved, say some training."""
    inputs: Callable[[], dict[str, torch.Tensor]] = dict
    save: dict[str, Any] = field(default_factory=dict)
    merges: bool = True
    right: Callable[[nn.Module, dict[str, torch.Tensor]], None] | None = None
    """Where the peer's answer is known to be wrong: writes the adapter's tensors into the base as they should act."""
    size: float = 0.2
    seed: int = 1


def of(kind: str, **fields: Any) -> Callable[[Any], Any]:
    return lambda peft: getattr(peft, f"{kind}Config")(**fields)


def linear(name: str, kind: str, base: str = "mlp", case: dict[str, Any] | None = None, **fields: Any) -> Case:
    """A method on the two linear layers of the small base."""
    targets = {"mlp": ["fc1", "fc2"], "stack": ["up", "down"]}[base]
    return Case(name, base, of(kind, target_modules=targets, **fields), **(case or {}))


def lora(name: str, base: str, targets: Any = ("layer",), case: dict[str, Any] | None = None, **fields: Any) -> Case:
    targets = targets if isinstance(targets, str) or targets is None else list(targets)
    return Case(
        f"lora_{name}", base, of("Lora", **{"r": 2, "lora_alpha": 4, **fields}, target_modules=targets), **(case or {})
    )


def prune(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """A few steps of AdaLoRA, until its budget is spent."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(12):
        (model(inputs["x"]) - 1).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def new_rows(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Rows that were added to the vocabulary and trained outside the adapter."""
    with torch.no_grad():
        for embedding in (
            model.get_base_model().get_input_embeddings(),
            model.get_base_model().get_output_embeddings(),
        ):
            embedding.weight[24:] = torch.linspace(-1, 1, 64).view(8, 8)


def attention_once(base: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """LoRA on attention, each delta added once; the peer adds that of the output projection twice (peft PR 3774)."""
    at = "base_model.model.attn."
    weights = {at: base.attn.in_proj_weight, at + "base_layer.out_proj.": base.attn.out_proj.weight}
    with torch.no_grad():
        for key, weight in weights.items():
            weight += 2 * tensors[key + "lora_B.weight"] @ tensors[key + "lora_A.weight"]


def tasks() -> dict[str, torch.Tensor]:
    return {"x": torch.linspace(-1, 1, 96).view(3, 2, 16), "task_ids": torch.tensor([0, 1, 0])}


LM = {"task_type": "CAUSAL_LM"}
QV = ("q_proj", "v_proj")

LORA = [
    lora("linear", "mlp", ("fc1", "fc2")),
    lora("rslora", "mlp", ("fc1", "fc2"), use_rslora=True, r=4),
    lora("lora_bias", "mlp", ("fc1", "fc2"), lora_bias=True),
    lora("bias_all", "mlp", ("fc2",), bias="all"),
    lora("bias_lora_only", "mlp", ("fc2",), bias="lora_only"),
    lora("patterns", "mlp", ("fc1", "fc2"), rank_pattern={"fc1": 4}, alpha_pattern={"^fc2": 8}),
    lora("modules_to_save", "mlp", ("fc1",), modules_to_save=["norm", "fc2"]),
    lora("two_adapters", "mlp", ("fc1", "fc2"), {"second": of("Lora", r=3, target_modules=["fc2"])}),
    lora("regex", "stack", r"layers\.\d+\.(up|down)", exclude_modules=["layers.0.up"]),
    lora("layers", "stack", ("up",), layers_to_transform=[1], layers_pattern="layers"),
    lora("all_linear", "stack", "all-linear"),
    lora("dora", "mlp", ("fc1", "fc2"), use_dora=True),
    lora("dora_conv2d", "conv2d", use_dora=True),
    lora("dora_embedding", "embedding", use_dora=True),
    lora("conv1d_hf", "conv1d_hf", fan_in_fan_out=True),
    lora("conv1d", "conv1d"),
    lora("conv2d", "conv2d"),
    lora("conv3d", "conv3d"),
    lora("embedding", "embedding"),
    lora("mha", "mha", ("attn",), {"right": attention_once}),
    lora("experts", "experts", None, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    lora("experts_one", "experts", ("head",), target_parameters=["experts.down_proj"]),
    lora("experts_turned", "experts_turned", None, target_parameters=["gate_up_proj", "experts.down_proj"]),
    lora("parameter", "parameter", None, target_parameters=["router.table"]),
    lora("tokens", "llama", QV, trainable_token_indices=[1, 5, 7], **LM),
    lora("tokens_tied", "llama_tied", QV, trainable_token_indices=[1, 5, 7], **LM),
    lora("tokens_dict", "llama", QV, trainable_token_indices={"embed_tokens": [4], "lm_head": [2, 3]}, **LM),
    lora("embed_tokens", "llama", ("embed_tokens", "lm_head"), **LM),
    lora("resized", "llama_resized", QV, {"then": new_rows, "save": {"save_embedding_layers": True}}, **LM),
    lora("classifier", "llama_classifier", QV, task_type="SEQ_CLS"),
    lora("lm_head_saved", "llama", QV, modules_to_save=["lm_head"], **LM),
    lora("gpt2", "gpt2", ("c_attn", "c_proj"), fan_in_fan_out=True, **LM),
    lora("t5", "t5", ("q", "v"), task_type="SEQ_2_SEQ_LM"),
    lora("replicated", "llama", QV, {"merges": False}, layer_replication=[(0, 2), (1, 2)], **LM),
    lora(
        "bdlora",
        "mlp",
        ("fc1", "fc2"),
        use_bdlora={"target_modules_bd_a": ["fc1"], "target_modules_bd_b": ["fc2"], "nblocks": 2},
    ),
    lora("kasa", "mlp", ("fc1", "fc2"), kasa_config={"beta": 1e-4}),
]

LINEAR = [
    linear("adalora", "AdaLora", init_r=3, target_r=2, total_step=20, tfinal=5),
    linear("adalora_pruned", "AdaLora", case={"then": prune}, init_r=4, target_r=2, total_step=12, tfinal=4),
    linear("ia3", "IA3", feedforward_modules=["fc2"]),
    linear("loha", "LoHa", r=2, alpha=4),
    linear("lokr", "LoKr", r=2, alpha=4),
    linear("lokr_both", "LoKr", r=1, alpha=4, decompose_both=True, decompose_factor=4),
    linear("oft", "OFT", oft_block_size=4, use_cayley_neumann=False),
    linear("oft_neumann", "OFT", case={"size": 0.05}, oft_block_size=4),
    linear("oft_shared", "OFT", r=4, oft_block_size=0, block_share=True, coft=True, eps=0.1),
    linear("boft", "BOFT", boft_block_size=4),
    linear("boft_butterfly", "BOFT", boft_block_size=4, boft_n_butterfly_factor=2),
    linear("hra", "HRA", r=4),
    linear("hra_gs", "HRA", r=4, apply_GS=True),
    linear("vera", "Vera", r=4),
    linear("vera_stack", "Vera", "stack", r=4, save_projection=False),
    linear("pvera", "Pvera", r=4),
    linear("randlora", "RandLora", r=4, randlora_alpha=16),
    linear("randlora_sparse", "RandLora", "stack", r=4, randlora_alpha=16, sparse=True),
    linear("vblora", "VBLoRA", r=2, num_vectors=6, vector_length=4),
    linear("vblora_topk", "VBLoRA", r=2, num_vectors=6, vector_length=4, save_only_topk_weights=True),
    linear("unilora", "UniLora", r=2, theta_d_length=32),
    linear("unilora_indices", "UniLora", r=2, theta_d_length=32, save_indices=True),
    linear("tinylora", "TinyLora", r=2, u=6),
    linear("tinylora_tied", "TinyLora", "stack", r=2, u=6, weight_tying=1.0),
    linear("fourierft", "FourierFT", n_frequency=20, scaling=20.0),
    linear("waveft", "WaveFT", n_frequency=20, scaling=5.0),
    linear("waveft_db2", "WaveFT", n_frequency=20, scaling=5.0, wavelet_family="db2"),
    linear("c3a", "C3A", block_size=4),
    linear("miss", "Miss", r=4),
    linear("miss_bat", "Miss", r=4, init_weights="bat"),
    linear("miss_mini", "Miss", r=4, mini_r=4, init_weights="mini"),
    linear("shira", "Shira", r=2, random_seed=3),
    *(linear(f"road_{n}", "Road", variant=f"road_{n}", group_size=8) for n in (1, 2, 4)),
    linear("delora", "Delora", r=2, delora_lambda=4),
    linear("gralora", "Gralora", r=4, gralora_k=2, alpha=8),
    linear("gralora_hybrid", "Gralora", r=4, gralora_k=2, alpha=8, hybrid_r=2),
    linear("hira", "Hira", r=2),
    linear("glora", "Glora", r=2),
    linear("glora_vector", "Glora", r=2, config_A_B="vector", config_C="vector", config_D_E="vector"),
    linear("deft", "Deft", r=2),
    linear("deft_qr", "Deft", r=2, decomposition_method="qr", alpha=4),
    linear("deft_para", "Deft", r=2, para=True),
    linear("psoft", "Psoft", r=4, psoft_alpha=4),
    linear("psoft_pissa", "Psoft", r=4, psoft_alpha=4, ab_svd_init="pissa_init", use_cayley_neumann=True),
    linear("peanut", "Peanut", r=4),
    linear("peanut_deep", "Peanut", r=4, depth=2, act_fn="gelu"),
    linear("lily", "Lily", "stack", case={"merges": False}, r=4, num_B=2),
    linear("adamss", "Adamss", r=6, num_subspaces=2, subspace_rank=2),
    linear("beft", "Beft"),
    linear("frod", "Frod", "stack", sparse_rate=0.1, progressbar=False),
    linear("supertuning", "Supertuning", sparsity=0.9),
    linear("supertuning_lora", "Supertuning", sparsity=0.9, r=2),
    linear("osf", "OSF", effective_rank=4),
    linear("poly", "Poly", case={"merges": False, "inputs": tasks}, r=2, n_tasks=2, n_skills=3, n_splits=2),
    Case("ln_tuning", "mlp", of("LNTuning", target_modules=["norm"])),
    Case("trainable_tokens", "embedding", of("TrainableTokens", target_modules=["layer"], token_indices=[2, 5, 9])),
    Case("trainable_tokens_tied", "llama_tied", of("TrainableTokens", token_indices=[4, 6], **LM)),
]

OTHER_LAYERS = [
    Case("ia3_conv2d", "conv2d", of("IA3", target_modules=["layer"], feedforward_modules=[])),
    Case("loha_conv2d", "conv2d", of("LoHa", r=2, target_modules=["layer"])),
    Case("loha_conv2d_effective", "conv2d", of("LoHa", r=2, target_modules=["layer"], use_effective_conv2d=True)),
    Case("lokr_conv2d", "conv2d", of("LoKr", r=1, target_modules=["layer"])),
    Case("lokr_conv2d_effective", "conv2d", of("LoKr", r=1, target_modules=["layer"], use_effective_conv2d=True)),
    Case(
        "adalora_conv1d_hf",
        "conv1d_hf",
        of("AdaLora", init_r=3, target_r=2, total_step=9, target_modules=["layer"], fan_in_fan_out=True),
    ),
    Case("boft_conv2d", "conv2d", of("BOFT", target_modules=["layer"], boft_block_size=3)),
    Case("hra_conv2d", "conv2d", of("HRA", r=2, target_modules=["layer"])),
    Case("oft_embedding", "embedding", of("OFT", oft_block_size=4, target_modules=["layer"])),
    Case("hira_embedding", "embedding", of("Hira", r=2, target_modules=["layer"])),
    Case("hira_conv2d", "conv2d", of("Hira", r=2, target_modules=["layer"])),
    Case("vera_conv1d_hf", "conv1d_hf", of("Vera", r=2, target_modules=["layer"], fan_in_fan_out=True)),
    Case("ia3_llama", "llama", of("IA3", **LM)),
    Case("ln_tuning_llama", "llama", of("LNTuning", **LM)),
]

PROMPTS = [
    Case("prompt_tuning", "llama", of("PromptTuning", num_virtual_tokens=3, **LM), merges=False),
    Case("prompt_tuning_t5", "t5", of("PromptTuning", num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM"), merges=False),
    Case("p_tuning", "llama", of("PromptEncoder", num_virtual_tokens=3, encoder_hidden_size=8, **LM), merges=False),
    Case(
        "p_tuning_lstm",
        "llama",
        of("PromptEncoder", num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **LM),
        merges=False,
    ),
    Case("prefix_tuning", "llama", of("PrefixTuning", num_virtual_tokens=3, **LM), merges=False),
    Case(
        "prefix_tuning_projection",
        "llama",
        of("PrefixTuning", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, **LM),
        merges=False,
    ),
    Case("prefix_tuning_gpt2", "gpt2", of("PrefixTuning", num_virtual_tokens=3, **LM), merges=False),
    Case(
        "multitask_prompt_tuning",
        "llama",
        of("MultitaskPromptTuning", num_virtual_tokens=3, num_tasks=2, num_ranks=2, **LM),
        merges=False,
        inputs=lambda: {"task_ids": torch.tensor([0, 1])},
    ),
    Case(
        "cpt",
        "llama",
        of(
            "CPT",
            num_virtual_tokens=4,
            cpt_token_ids=[3, 4, 5, 6],
            cpt_mask=[1] * 4,
            cpt_tokens_type_mask=[1, 2, 3, 4],
            **LM,
        ),
        merges=False,
    ),
    Case("cartridge", "llama", of("Cartridge", num_virtual_tokens=3, num_frozen_tokens=1, **LM), merges=False),
    Case("adaption_prompt", "llama", of("AdaptionPrompt", adapter_len=3, adapter_layers=1, **LM), merges=False),
    Case("shadow", "llama", of("Shadow", r=2, shadow_num_hidden_layers=1, **LM), merges=False),
]

CASES = [*LORA, *LINEAR, *OTHER_LAYERS, *PROMPTS]
