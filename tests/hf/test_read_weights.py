"""Layers whose weight is read by the code around them: Mamba's mixers and their like."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hf import tiny
from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.hf.read_weights import read_by
from veneer.methods.mola import MolaConfig

COMMON = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
HEADS = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
MODELS = {
    "mamba": (MambaForCausalLM, MambaConfig, {"state_size": 4}),
    "mamba2": (
        Mamba2ForCausalLM,
        Mamba2Config,
        {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "falcon_h1": (
        FalconH1ForCausalLM,
        FalconH1Config,
        HEADS | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4},
    ),
    "jamba": (
        JambaForCausalLM,
        JambaConfig,
        HEADS
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
}
IDS = torch.randint(3, 32, (2, 12), generator=torch.Generator().manual_seed(0))


def build(family: str) -> nn.Module:
    make, config, own = MODELS[family]
    torch.manual_seed(0)
    return make(config(**COMMON, **own, eos_token_id=2)).eval()


def stirred(model: nn.Module, std: float = 0.05) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_every_linear_layer_learns_and_acts_as_its_merged_weight_does(family, tmp_path):
    model = stirred(get_peft_model(build(family), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))
    model.train()(IDS, labels=IDS).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted, text = model(IDS).logits, model.generate(input_ids=IDS[:, :5], max_new_tokens=5, do_sample=False)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, build(family)(IDS).logits)
        again = PeftModel.from_pretrained(build(family), tmp_path)
        torch.testing.assert_close(again(IDS).logits, wanted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, wanted)
        assert torch.equal(merged.generate(input_ids=IDS[:, :5], max_new_tokens=5, do_sample=False), text)


@pytest.mark.parametrize("leaf", ["dt_proj", "out_proj", "x_proj"])
def test_an_adapter_at_one_read_layer_has_an_effect(leaf):
    model = stirred(get_peft_model(build("mamba"), LoraConfig(r=4, target_modules=[leaf])), std=2.0)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, build("mamba")(IDS).logits)  # a bypassed one has none at all


def test_a_depthwise_convolution_is_adapted_where_its_factors_have_its_groups():
    config = LoraConfig(r=32, target_modules=["conv1d"])
    model = stirred(get_peft_model(build("mamba"), config))
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    wanted = model.eval()(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, wanted)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=4, target_modules=["conv1d"]), "no grouped weight.*exclude_modules=..conv1d.."),
        (LoraConfig(r=4, target_modules=["out_proj"], lora_dropout=0.1), "set the dropout to 0"),
        (MolaConfig(r=2, experts=2, top_k=1, target_modules=["dt_proj"]), "depends on its input"),
    ],
)
def test_what_has_no_weight_there_is_refused_and_nothing_is_planted(config, words):
    base = build("mamba")
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=f"MambaMixer reads the weight of 'backbone.layers.0.mixer.*{words}"):
        get_peft_model(base, config)
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_dropout_does_not_hinder_inference():
    config = LoraConfig(r=4, target_modules=["out_proj"], lora_dropout=0.1, inference_mode=True)
    assert get_peft_model(build("mamba"), config)(IDS).logits.shape == (2, 12, 32)


def test_rows_with_adapters_of_their_own_are_refused_where_one_weight_is_read():
    model = stirred(get_peft_model(build("mamba"), LoraConfig(r=4, target_modules=["in_proj", "dt_proj"])))
    alone = model(IDS).logits
    torch.testing.assert_close(model(IDS, adapter_names=["default"] * 2).logits, alone)
    with pytest.raises(ValueError, match="read as one for the whole batch"):
        model(IDS, adapter_names=["default", "__base__"])


def test_other_methods_and_biases_act_there_too():
    model = get_peft_model(build("mamba"), IA3Config(target_modules=["dt_proj", "out_proj"], feedforward_modules=[]))
    assert torch.allclose(model(IDS).logits, build("mamba")(IDS).logits)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    wanted = model(IDS).logits
    assert not torch.allclose(wanted, build("mamba")(IDS).logits, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, wanted)
    biased = get_peft_model(build("mamba"), LoraConfig(r=4, target_modules=["dt_proj"], bias="lora_only"))
    biased.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for n, p in biased.named_parameters() if n.endswith("bias__bias") or ".bias.bias" in n)


class Outer(nn.Module):
    """A module like a stranger's: reads one layer, asks harmless things of another."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"read": nn.Linear(4, 4)})
        self.read, self.asked, self.tied = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x.to(self.asked.weight.dtype)
        if self.asked.bias is not None and isinstance(self.asked.weight, torch.Tensor):
            x = self.asked(x)
        return self.kernel(x)

    def kernel(self, x):
        return x @ self.read.weight.T + self.read.bias

    def tie(self):
        self.tied.weight = self.read.weight


def test_what_a_class_reads_is_found_in_what_its_forward_runs():
    assert read_by(Outer) == {"read"}
    assert not read_by(type(tiny.llama().model.layers[0].mlp))
    model = get_peft_model(Outer(), LoraConfig(r=2, target_modules=["read", "asked", "tied"], init_lora_weights=False))
    x = torch.randn(3, 4)
    wanted = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)
