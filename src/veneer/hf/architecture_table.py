"""Which modules of a known architecture a method adapts by default: facts, by transformers' ``model_type``.

The rows of the families that the peer knows say what it says, so that a config without ``target_modules`` means the
same; the other rows were read off the models as transformers builds them. Some rows name the modules of more than one
generation of a family (experts fused or apart, renamed layers), so not every name is found in every model.
"""

from __future__ import annotations

Targets = list[str] | str
"""Names, or a regular expression for whole paths."""


def _table(*rows: tuple[Targets, str]) -> dict[str, Targets]:
    return {model_type: targets for targets, model_types in rows for model_type in model_types.split()}


ATTENTION: dict[str, Targets] = _table(
    (
        ["q_proj", "v_proj"],
        "apertus arcee bart beit bigbird_pegasus bitnet blenderbot blenderbot-small clip clip_text_model "
        "clip_vision_model cohere cohere2 csm dia diffllama dinov3_vit ernie4_5 ernie4_5_moe eurobert "
        "exaone4 falcon_h1 fsmt gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe "
        "glm4v gpt_neo gpt_oss gptj granite granitemoe helium hubert kosmos-2 led lfm2 llama llama4 "
        "llama4_text m2m_100 marian mbart minimax mistral mixtral mllama modernbert-decoder moonshine "
        "nllb-moe nomic_bert olmo olmo2 olmo3 olmo_hybrid olmoe opt parakeet_encoder patchtst pegasus "
        "phimoe qwen2 qwen2_5_vl qwen2_5_vl_text qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_5 "
        "qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_text "
        "seamless_m4t seamless_m4t_v2 seed_oss segformer siglip siglip2 siglip_vision_model smollm3 "
        "speech_to_text speecht5 stablelm starcoder2 t5gemma trocr unispeech vaultgemma wav2vec2 wavlm "
        "whisper xglm zamba2",
    ),
    (
        ["query", "value"],
        "albert align bert big_bird blip camembert clap convbert data2vec-text electra ernie layoutlm "
        "layoutlmv3 longformer mobilebert rembert roberta roberta-prelayernorm roformer swinv2 videomae "
        "vilt xlm-roberta xlm-roberta-xl",
    ),
    (
        r".*language_model\..*\.(q_proj|v_proj)",
        "gemma3 gemma4 internvl llava llava_next llava_onevision mistral3 paligemma qwen2_audio voxtral",
    ),
    (["query_key_value"], "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox gpt_neox_japanese persimmon"),
    (
        ["query", "value", "q_proj", "v_proj"],
        "audio-spectrogram-transformer deit dinov2 dinov2_with_registers swin vit vit_mae vit_msn",
    ),
    (["q", "v"], "longt5 mpnet mt5 switch_transformers t5 umt5"),
    (["c_attn"], "gpt2 gpt_bigcode openai-gpt"),
    (r".*text_model\..*\.(q_proj|v_proj)", "idefics2 idefics3 smolvlm"),
    (["q", "v", "q_proj", "v_proj"], "blip-2 instructblip"),
    (["query_proj", "value_proj"], "deberta-v2 prophetnet"),
    (["in_proj"], "deberta mamba2"),
    (["Wqkv"], "modernbert mpt"),
    (["qkv_proj"], "codegen phi3"),
    (["q_lin", "v_lin"], "distilbert xlm"),
    (["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"], "deepseek_v2 deepseek_v3"),
    (["in_proj", "x_proj"], "falcon_mamba mamba"),
    (["q_proj", "v_proj", "in_proj"], "bamba granitemoehybrid"),
    (["c_proj", "c_attn"], "btlm"),
    (["q_proj", "v_proj", "fc1", "fc2"], "phi"),
    (["q_proj", "k_proj", "v_proj", "o_proj"], "nemotron_h"),
    (["key", "value", "receptance", "output"], "rwkv"),
    (["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"], "rwkv7"),
    (["Wq", "Wv"], "ctrl"),
    (["q_proj", "v_proj", "in_proj", "x_proj"], "jamba"),
    (["linear_q", "linear_v"], "wav2vec2-bert"),
    (["qkv"], "timesformer"),
    (["att_proj"], "bark"),
)
"""Attention projections: the default of every method that adapts linear layers."""

IA3: dict[str, Targets] = _table(
    (
        ["k_proj", "v_proj", "down_proj"],
        "bitnet cohere cohere2 diffllama ernie4_5 eurobert exaone4 gemma3n_text gemma4_text glm glm4 "
        "granite helium llama mistral mllama nomic_bert olmo olmo2 olmo3 qwen2_5_vl_text qwen2_vl_text "
        "qwen3_vl_text seed_oss smollm3 t5gemma vaultgemma",
    ),
    (
        ["k_proj", "v_proj"],
        "ernie4_5_moe glm4_moe gpt_oss granitemoe llama4_text minimax olmoe phimoe qwen2_moe qwen3_5_moe "
        "qwen3_5_moe_text qwen3_moe qwen3_next",
    ),
    (["q_proj", "v_proj", "down_proj"], "gemma gemma2 gemma3_text llama4 qwen2 qwen3"),
    (["query_key_value", "dense_4h_to_h"], "RefinedWeb RefinedWebModel falcon gpt_neox"),
    (["c_attn", "mlp.c_proj"], "gpt2 gpt_bigcode"),
    (["key", "value", "output.dense"], "bert roberta"),
    (["q_proj", "v_proj", "fc2"], "bart phi"),
    (["k", "v", "wo"], "t5"),
    (["k", "v", "wi_1"], "mt5"),
    (["query_key_value", "mlp.dense_4h_to_h"], "bloom"),
    (["q_proj", "k_proj", "fc2"], "opt"),
    (["q_proj", "v_proj", "fc_out"], "gptj"),
    (["q_proj", "v_proj", "c_proj"], "gpt_neo"),
    (["k_proj", "v_proj", "w2"], "mixtral"),
    (["key_proj", "value_proj", "output.dense"], "deberta-v2"),
    (["in_proj", "output.dense"], "deberta"),
    (["qkv_proj", "down_proj"], "phi3"),
)
"""Keys, values and the second layer of the feed-forward block."""

IA3_FEEDFORWARD: dict[str, Targets] = _table(
    (
        ["down_proj"],
        "bitnet cohere cohere2 diffllama ernie4_5 eurobert exaone4 gemma gemma2 gemma3_text gemma3n_text "
        "gemma4_text glm glm4 granite helium llama llama4 mistral mllama nomic_bert olmo olmo2 olmo3 "
        "phi3 qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_vl_text seed_oss smollm3 t5gemma "
        "vaultgemma",
    ),
    (
        [],
        "ernie4_5_moe glm4_moe gpt_oss granitemoe llama4_text minimax mt5 olmoe phimoe qwen2_moe "
        "qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next",
    ),
    (["output.dense"], "bert deberta deberta-v2 roberta"),
    (["dense_4h_to_h"], "RefinedWeb RefinedWebModel falcon gpt_neox"),
    (["fc2"], "bart opt phi"),
    (["mlp.c_proj"], "gpt2 gpt_bigcode"),
    (["wo"], "t5"),
    (["mlp.dense_4h_to_h"], "bloom"),
    (["fc_out"], "gptj"),
    (["c_proj"], "gpt_neo"),
    (["w2"], "mixtral"),
)
"""Of these, the layers whose input is scaled rather than their output."""

NORMS: dict[str, Targets] = _table(
    (
        ["input_layernorm", "post_attention_layernorm", "norm"],
        "bitnet deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe eurobert gemma glm glm4_moe "
        "gpt_oss granite granitemoe helium llama llama4 llama4_text minimax mistral mixtral mllama olmo "
        "olmoe phi3 phimoe qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3_5_moe qwen3_5_moe_text "
        "qwen3_moe qwen3_next qwen3_vl_text seed_oss smollm3",
    ),
    (["LayerNorm"], "bert camembert deberta deberta-v2 electra roberta xlm-roberta"),
    (
        [
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ],
        "gemma2 gemma3_text gemma3n_text gemma4_text",
    ),
    (["post_attention_layernorm", "post_feedforward_layernorm", "norm"], "exaone4 olmo2 olmo3"),
    (["input_layernorm", "post_attention_layernorm", "ln_f"], "bloom falcon"),
    (["layer_norm", "final_layer_norm"], "mt5 t5"),
    (["post_attention_layernorm"], "qwen2 qwen3"),
    (["input_layernorm", "norm"], "cohere cohere2"),
    (
        ["multi_modal_projector", "input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"],
        "llava",
    ),
    (["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"], "bart"),
    (["ln_1", "ln_2", "ln_f"], "gpt2"),
    (["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"], "blip-2"),
    (["ln_1", "ln_f"], "gptj"),
    (["input_layernorm", "final_layernorm"], "phi"),
    (["input_layernorm", "pre_feedforward_layernorm", "norm"], "vaultgemma"),
    (["post_attention_layernorm", "post_mlp_layernorm"], "nomic_bert"),
    (["input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm", "norm"], "glm4"),
)
"""Normalisation layers."""

VALUES: dict[str, Targets] = _table(
    (
        ["v_proj"],
        "apertus arcee bart beit bigbird_pegasus bitnet blenderbot blenderbot-small clip clip_text_model "
        "clip_vision_model cohere cohere2 csm dia diffllama dinov3_vit ernie4_5 ernie4_5_moe eurobert "
        "exaone4 falcon_h1 fsmt gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe "
        "glm4v gpt_neo gpt_oss gptj granite granitemoe helium hubert kosmos-2 led lfm2 llama llama4 "
        "llama4_text m2m_100 marian mbart minimax mistral mixtral mllama modernbert-decoder moonshine "
        "nllb-moe nomic_bert olmo olmo2 olmo3 olmo_hybrid olmoe opt parakeet_encoder patchtst pegasus "
        "phi phimoe qwen2 qwen2_5_vl qwen2_5_vl_text qwen2_moe qwen2_vl qwen2_vl_text qwen3 qwen3_5 "
        "qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_vl qwen3_vl_text "
        "seamless_m4t seamless_m4t_v2 seed_oss segformer siglip siglip2 siglip_vision_model smollm3 "
        "speech_to_text speecht5 starcoder2 t5gemma trocr unispeech vaultgemma wav2vec2 wavlm whisper "
        "xglm zamba2",
    ),
    (
        ["value"],
        "albert align bert big_bird blip camembert clap convbert data2vec-text ernie layoutlmv3 "
        "longformer mobilebert rembert roberta roberta-prelayernorm roformer swinv2 videomae vilt "
        "xlm-roberta-xl",
    ),
    (["v"], "mt5 t5"),
    (["value_proj"], "deberta-v2"),
)
"""Value projections, whose bias BEFT trains."""

ALL_PROJECTIONS: dict[str, Targets] = _table(
    (
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
        "bitnet cohere cohere2 diffllama ernie4_5 eurobert exaone4 gemma gemma2 gemma3_text gemma3n_text "
        "gemma4_text granite helium llama llama4 mistral mixtral mllama nomic_bert olmo olmo2 olmo3 phi "
        "qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_vl_text seed_oss smollm3 t5gemma vaultgemma",
    ),
    (["query_key_value", "dense_4h_to_h"], "bloom falcon gpt_neox"),
    (["c_attn", "c_proj"], "gpt2 gpt_bigcode"),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "opt"),
    (["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"], "gptj"),
)
"""Every projection of a block, which OSF splits."""

ATTENTION_MODULES: dict[str, Targets] = _table(
    (["self_attn"], "llama mistral"),
    (["attn"], "gpt2"),
)
"""Whole attention blocks, for the adaption prompt."""

OTHERWISE: dict[str, dict[str, Targets]] = {
    "ADALORA": _table(
        (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "bart opt"),
        (["q", "k", "v", "o", "wi", "wo"], "t5"),
        (["q", "k", "v", "o", "wi_0", "wi_1", "wo"], "mt5"),
        (["query", "key", "value", "dense"], "roberta"),
        (["query_proj", "key_proj", "value_proj", "dense"], "deberta-v2"),
    ),
    "VBLORA": _table(
        (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "bart opt"),
        (["q", "k", "v", "o", "wi", "wo"], "t5"),
        (["q", "k", "v", "o", "wi_0", "wi_1", "wo"], "mt5"),
        (["query_proj", "key_proj", "value_proj", "dense"], "deberta-v2"),
    ),
    "C3A": _table(
        (["mlp.c_proj"], "gpt2 gpt_bigcode"),
    ),
    "FOURIERFT": _table(
        (["mlp.c_proj"], "gpt2 gpt_bigcode"),
    ),
    "WAVEFT": _table(
        (["mlp.c_proj"], "gpt2 gpt_bigcode"),
    ),
    "FROD": _table(
        (["q_proj", "v_proj"], "phi"),
    ),
    "PVERA": _table(
        (["q_proj", "v_proj"], "phi"),
    ),
    "VERA": _table(
        (["q_proj", "v_proj"], "phi"),
    ),
    "SHIRA": _table(
        (["q_proj", "v_proj"], "phi"),
    ),
}
"""Methods that differ from ``ATTENTION`` for some families."""
