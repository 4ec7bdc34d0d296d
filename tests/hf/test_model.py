"""PeftModel over transformers models: the API people know, files both ways with the peer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import veneer
from veneer import LoraConfig, PeftModel, get_peft_model

IDS = torch.arange(4, 25).reshape(3, 7)


def llama(cls=LlamaForCausalLM, **options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return cls(LlamaConfig(**(sizes | heads | options))).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def bert(cls) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    return cls(config).eval()


def options(**more) -> dict:
    return {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | more


def logits(model: nn.Module, **inputs) -> torch.Tensor:
    inputs = inputs or {"input_ids": IDS}
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else torch.stack([out.start_logits, out.end_logits])


CASES = {
    "llama_all_linear": (llama, options(target_modules="all-linear", task_type="CAUSAL_LM"), {}),
    "llama_default_targets": (llama, options(task_type="CAUSAL_LM", use_rslora=True), {}),
    "llama_tied_tokens": (
        lambda: llama(tie_word_embeddings=True),
        options(target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[3, 9]),
        {},
    ),
    "llama_head_saved": (
        llama, options(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"), {}
    ),
    "llama_patterns": (
        llama,
        options(
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 6},
            alpha_pattern={"v_proj": 32}, task_type="CAUSAL_LM", layers_to_transform=[0, 1],
        ),
        {},
    ),
    "llama_regex": (llama, options(target_modules=r".*layers\.1.*(q|k)_proj", task_type="CAUSAL_LM"), {}),
    "llama_embedding": (llama, options(target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"), {}),
    "llama_classifier": (
        lambda: llama(LlamaForSequenceClassification), options(target_modules=["q_proj"], task_type="SEQ_CLS"), {}
    ),
    "gpt2": (gpt2, options(task_type="CAUSAL_LM", bias="lora_only"), {}),
    "gpt2_bias_all": (
        gpt2, options(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], bias="all", fan_in_fan_out=True), {}
    ),
    "t5": (t5, options(task_type="SEQ_2_SEQ_LM"), {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}),
    "bert_classifier": (lambda: bert(BertForSequenceClassification), options(task_type="SEQ_CLS"), {}),
    "bert_tokens": (lambda: bert(BertForTokenClassification), options(task_type="TOKEN_CLS"), {}),
    "bert_qa": (lambda: bert(BertForQuestionAnswering), options(task_type="QUESTION_ANS"), {}),
}  # fmt: skip


def stir(model: nn.Module) -> None:
    """Give every trainable tensor a new value, the same for equal shapes in equal order of their sizes' kin."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("case", CASES)
def test_files_work_both_ways_with_the_peer(case: str, tmp_path: Path) -> None:
    base, config, inputs = CASES[case]
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**copy.deepcopy(config)))
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    assert torch.allclose(logits(ours, **inputs), logits(theirs, **inputs), atol=1e-5)
    assert type(ours).__name__ == type(theirs).__name__

    ours = get_peft_model(base(), LoraConfig(**copy.deepcopy(config)))
    stir(ours)
    ours.eval().save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert torch.allclose(logits(theirs, **inputs), logits(ours, **inputs), atol=1e-5)
    again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert torch.equal(logits(again, **inputs), logits(ours, **inputs))
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged, **inputs), logits(ours, **inputs), atol=1e-4)
    assert type(merged) is type(base())


@pytest.mark.parametrize("case", ["llama_all_linear", "t5", "gpt2"])
def test_generate_goes_through_the_adapter_and_back_off(case: str) -> None:
    base, config, inputs = CASES[case]
    plain = base()
    model = get_peft_model(base(), LoraConfig(**copy.deepcopy(config)))
    stir(model)
    model.eval()
    arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    expected = plain.generate(**arguments)
    with model.disable_adapter():
        assert torch.equal(model.generate(**arguments), expected)
    greedy = model.generate(**arguments)
    assert not torch.equal(greedy, expected)
    assert torch.equal(copy.deepcopy(model).merge_and_unload().generate(**arguments), greedy)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_generates_what_each_adapter_would_alone(beams: int) -> None:
    model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM")))
    stir(model)
    model.add_adapter("other", LoraConfig(**options(task_type="CAUSAL_LM", r=2)))
    model.eval()
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    arguments["attention_mask"] = torch.ones(1, 7, dtype=torch.long)
    alone = []
    for name, row in zip(["default", "other", "__base__"], IDS, strict=True):
        if name != "__base__":
            model.set_adapter(name)
            alone.append(model.generate(input_ids=row[None], **arguments))
        else:
            with model.disable_adapter():
                alone.append(model.generate(input_ids=row[None], **arguments))
    arguments["attention_mask"] = torch.ones_like(IDS)
    mixed = model.generate(input_ids=IDS, adapter_names=["default", "other", "__base__"], **arguments)
    assert torch.equal(mixed, torch.cat(alone))
    assert model.base_model.state.route is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM", target_modules="all-linear")))
        stir(model)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, atol=1e-6)


def test_several_adapters_save_into_folders_of_their_names(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM")))
    model.add_adapter("sql", LoraConfig(**options(task_type="CAUSAL_LM", r=2)))
    model.set_adapter("sql")
    stir(model)
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "sql" / "adapter_config.json").is_file()
    for library in (veneer, peft):
        again = library.PeftModel.from_pretrained(llama(), tmp_path)
        again.load_adapter(tmp_path / "sql", "sql")
        again.set_adapter("sql")
        assert torch.allclose(logits(again.eval()), logits(model), atol=1e-6)
        by_subfolder = library.PeftModel.from_pretrained(llama(), tmp_path, subfolder="sql")
        assert torch.allclose(logits(by_subfolder), logits(model), atol=1e-6)


def test_the_file_names_the_layers_not_the_rule(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM", target_modules="all-linear")))
    model.save_pretrained(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_resized_embeddings_are_saved_and_come_back(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(44)
    model = get_peft_model(model, LoraConfig(**options(task_type="CAUSAL_LM"))).eval()
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(9)
    fresh.resize_token_embeddings(44)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    get_peft_model(llama(hidden_size=32), LoraConfig(**options(task_type="CAUSAL_LM"))).save_pretrained(tmp_path)
    model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM"))).eval()
    y, names = logits(model), {n for n, _ in model.named_modules()}
    with pytest.raises(ValueError, match="another size"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"] and {n for n, _ in model.named_modules()} == names
    assert torch.equal(logits(model), y)
    base = llama()
    expected = logits(base)
    with pytest.raises(ValueError, match="another size"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), expected) and not any("adapters" in n for n, _ in base.named_modules())
    with pytest.raises(ValueError, match="nowhere"):
        PeftModel.from_pretrained(base, tmp_path / "nowhere")


def test_key_mapping_and_low_memory_loading(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM"))).eval()
    stir(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.device.type == "meta" for p in again.parameters())
    tensors = veneer.load_peft_weights(tmp_path, key_mapping={r"^model\.layers": "decoder.blocks"})
    assert all("decoder.blocks" in key for key in tensors)


def test_half_precision_adapters_follow_the_policy() -> None:
    base = llama().to(torch.bfloat16)
    float32 = get_peft_model(copy.deepcopy(base), LoraConfig(**options(task_type="CAUSAL_LM")))
    half = get_peft_model(base, LoraConfig(**options(task_type="CAUSAL_LM")), autocast_adapter_dtype=False)
    for model, dtype in ((float32, torch.float32), (half, torch.bfloat16)):
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        assert logits(model).dtype == torch.bfloat16


def test_counts_and_lookups() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * 4 * (16 + 16 + 16 + 8)  # q: 16 -> 16, v: 16 -> 8, in two layers
    assert total == trainable + sum(p.numel() for p in llama().parameters())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 16) and layer.scaling["default"] == 2.0
    assert layer.weight is layer.base_layer.weight and layer.in_features == 16
    assert model.config.hidden_size == 16 and model.active_adapter == "default"


def test_a_model_of_ones_own_needs_no_transformers_config(tmp_path: Path) -> None:
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.seq = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            return self.seq(x)

    config = {"target_modules": ["seq.0", "seq.2"], "modules_to_save": ["seq.4"]} | options()
    x = torch.randn(5, 4)
    model = get_peft_model(Mlp(), LoraConfig(**config))
    stir(model)
    model.save_pretrained(tmp_path)
    for library in (veneer, peft):
        assert torch.allclose(library.PeftModel.from_pretrained(Mlp(), tmp_path)(x), model(x), atol=1e-6)
    tuner = veneer.LoraModel(Mlp(), LoraConfig(**config), "default")
    assert tuner.active_adapters == ["default"] and tuner(x).shape == (5, 2)
    with pytest.raises(ValueError, match="specify target_modules"):
        get_peft_model(Mlp(), LoraConfig())


def test_a_config_from_json_makes_the_same_model() -> None:
    config = LoraConfig(**options(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    again = LoraConfig(
        **json.loads(json.dumps(config.to_dict() | {"target_modules": ["q_proj"], "runtime_config": {}}))
    )
    assert again == config


def test_unbuilt_or_unknown_options_are_named() -> None:
    with pytest.raises(ImportError, match="megatron-core"):
        get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", megatron_config={"a": 1}))
    with pytest.raises(NotImplementedError, match="ephemeral_gpu_offload"):
        get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", runtime_config={"ephemeral_gpu_offload": True}))
    with pytest.raises(NotImplementedError, match="ephemeral_gpu_offload"):
        PeftModel.from_pretrained(llama(), "anywhere", ephemeral_gpu_offload=True)
    with pytest.raises(ValueError, match="init_lora_weights='pizza'"):
        get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pizza"))


def test_adapters_combine_into_a_new_one_by_the_name_people_know() -> None:
    model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM", use_rslora=True)))
    model.add_adapter("b", LoraConfig(**options(task_type="CAUSAL_LM", r=2)))
    stir(model)
    twin = copy.deepcopy(model).eval()
    errors = model.add_weighted_adapter(["default", "b"], [0.7, -0.3], "mix", combination_type="cat")
    assert set(errors.values()) == {0.0}
    model.eval().set_adapter("mix")
    twin.base_model.set_adapter(["default", "b"])
    twin.base_model.state.gains = {"default": 0.7, "b": -0.3}
    assert torch.allclose(logits(model), logits(twin), atol=1e-5)
    with pytest.raises(ValueError, match="mix"):
        model.add_weighted_adapter(["default"], [1.0], "mix")
