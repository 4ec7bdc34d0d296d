"""The default tables against the models as transformers builds them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from veneer.engine.targets import find
from veneer.hf import architecture_table as table
from veneer.hf.architectures import default_feedforward, default_targets, input_embedding, no_default, present

FAMILIES = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "llama4", "phi", "phi3"),
    *(
        "smollm3",
        "olmo2",
        "cohere2",
        "granite",
        "glm4",
        "deepseek_v3",
        "gpt_oss",
        "falcon",
        "bloom",
        "gpt2",
        "gpt_neox",
    ),
    *(
        "gptj",
        "gpt_neo",
        "opt",
        "codegen",
        "mpt",
        "mamba",
        "t5",
        "mt5",
        "bart",
        "whisper",
        "bert",
        "roberta",
        "electra",
    ),
    *("deberta-v2", "deberta", "distilbert", "modernbert", "vit", "dinov2", "clip", "siglip", "llava", "gemma3"),
    *("idefics3", "qwen2_vl", "blip-2", "wav2vec2"),
]


def shrunk(model_type):
    """A shallow model of a family on the meta device."""
    config = CONFIG_MAPPING[model_type]()
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))):
        for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"):
            if part is not None and isinstance(getattr(part, name, None), int) and getattr(part, name) > 2:
                setattr(part, name, 2)
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText, AutoModel):
        try:
            with torch.device("meta"):
                return auto.from_config(config)
        except ValueError:
            continue
    raise AssertionError(f"transformers builds no {model_type}")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_defaults_are_found_in_the_model(model_type):
    model = shrunk(model_type)
    for method in ("LORA", "IA3", "LN_TUNING", "BEFT", "OSF"):
        names = default_targets(method, model_type)
        if names is not None:
            found = find(model, SimpleNamespace(target_modules=names), strict=False)
            assert len(found) >= 2, (method, names)
    if (names := default_targets("LORA", model_type)) and isinstance(names, str):  # a family with towers
        assert not [t for t in find(model, SimpleNamespace(target_modules=names)) if "vision" in t.path]


def test_a_methods_own_rows_come_before_the_common_ones():
    assert default_targets("LORA", "gpt2") == ["c_attn"]
    assert default_targets("C3A", "gpt2") == ["mlp.c_proj"]
    assert default_targets("C3A", "llama") == default_targets("LORA", "llama") == ["q_proj", "v_proj"]
    assert default_targets("IA3", "codegen") is None  # no feed-forward rule is known, so none is guessed
    assert default_targets("LORA", "unheard-of") is None


def test_feedforward_modules_are_among_the_targets():
    for model_type in table.IA3:
        named, inner = default_targets("IA3", model_type), default_feedforward(model_type)
        assert inner is not None
        assert set(inner) <= set(named), model_type


def test_a_default_is_a_copy():
    default_targets("LORA", "llama").append("o_proj")
    assert default_targets("LORA", "llama") == ["q_proj", "v_proj"]


def test_the_peers_families_mean_the_same():
    peft = pytest.importorskip("peft")
    import peft.utils as utils

    constants = {**vars(peft), **vars(utils), **vars(utils.constants)}
    tables = {
        name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_TARGET_MODULES_MAPPING"): rows
        for name, rows in constants.items()
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING")
    }
    tables["LN_TUNING"] = tables.pop("LNTUNING")
    assert len(tables) > 25
    for method, rows in tables.items():
        for model_type, names in rows.items():
            if model_type in ("vit", "dinov2"):  # renamed in transformers 5: ours name both generations
                continue
            assert default_targets(method, model_type) == (names if isinstance(names, str) else list(names)), (
                method,
                model_type,
            )


def test_names_of_other_generations_are_left_out():
    model = shrunk("vit")
    assert present(model, default_targets("LORA", "vit")) == ["q_proj", "v_proj"]
    assert present(model, ["nothing"]) == ["nothing"]


def test_the_input_embedding_is_where_the_model_says():
    assert input_embedding(shrunk("gpt2")) == ["transformer.wte"]
    assert input_embedding(shrunk("t5")) == ["shared"]
    with pytest.raises(ValueError, match="Linear does not say where its input embedding is"):
        input_embedding(torch.nn.Linear(1, 1))


def test_an_unknown_family_gets_a_remedy():
    assert "'llama9' (known and alike: llama" in no_default("LORA", "llama9")
    assert "give target_modules" in no_default("LORA", None)
