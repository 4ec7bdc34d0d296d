"""Mixture-of-experts models whose experts are fused, and adapters from before they were."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from veneer import LoraConfig, PeftModel, get_peft_model

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 12}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4}),
}
OLD = {"mixtral": ("w1", "w3", "w2", "block_sparse_moe"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj", "mlp")}
"""The old names of the gate, up and down layers of an expert, and of the block that held them."""
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 32, (2, 12), generator=torch.Generator().manual_seed(0))


def build(family: str) -> nn.Module:
    make, config, own = MODELS[family]
    torch.manual_seed(0)
    model = make(config(**SIZES, **own)).eval()
    for name, parameter in model.named_parameters():
        if "experts." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", MODELS)
def test_lora_on_fused_experts_learns_saves_loads_and_merges(family, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKS, task_type="CAUSAL_LM")
    model = get_peft_model(build(family), config)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        assert not torch.allclose(wanted, build(family)(IDS).logits, atol=1e-3)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(build(family), tmp_path)(IDS).logits, wanted)
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


# ---- adapters of experts that were layers of their own ---------------------------------------------------------------
def factors(shape: tuple[int, int], r: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(r, shape[1], generator=draw), 0.1 * torch.randn(shape[0], r, generator=draw)


def old_adapter(family: str, folder, leaves: list[str], experts=range(4), r: int = 3, **more) -> nn.Module:
    """Write an adapter as transformers 4 knew the model, and return the base with its effect in the fused weights."""
    gate, up, down, block = OLD[family]
    config = LoraConfig(r=r, lora_alpha=6, target_modules=["q_proj", *leaves], task_type="CAUSAL_LM", **more)
    model, tensors = build(family), {}
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            q = layer.self_attn.q_proj.weight
            path = f"model.layers.{i}.self_attn.q_proj"
            a, b = factors(q.shape, r, 7 + i)
            q += config.at(path).scaling * b @ a
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            if "gate" in leaves:
                router, path = layer.mlp.gate.weight, f"model.layers.{i}.{block}.gate"
                a, b = factors(router.shape, r, 70 + i)
                router += config.at(path).scaling * b @ a
                tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            stacks = layer.mlp.experts
            half = stacks.gate_up_proj.shape[1] // 2
            rows = {
                gate: stacks.gate_up_proj[:, :half], up: stacks.gate_up_proj[:, half:], down: stacks.down_proj
            }  # fmt: skip
            for e in experts:
                for n, leaf in enumerate(name for name in (gate, up, down) if name in leaves):
                    path = f"model.layers.{i}.{block}.experts.{e}.{leaf}"
                    own = config.at(path)
                    a, b = factors(rows[leaf].shape[1:], own.r, 1000 * i + 10 * e + n)
                    rows[leaf][e] += own.scaling * b @ a
                    tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    config.write(folder)
    save_file(
        {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return model


CASES = {
    "all three": {"leaves": [0, 1, 2]},
    "one of the halves": {"leaves": [1]},
    "down alone": {"leaves": [2]},
    "some experts": {"leaves": [0, 1, 2], "experts": [0, 3]},
    "rank-stabilised": {"leaves": [0, 1, 2], "use_rslora": True},
    "ranks of their own": {
        "leaves": [0, 1, 2],
        "rank_pattern": {r"experts\.1\.\w+": 1},
        "alpha_pattern": {"q_proj": 9},
    },
    "with dropout": {"leaves": [0, 1, 2], "lora_dropout": 0.1},
}


@pytest.mark.parametrize("family", OLD)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_single_experts_acts_on_the_fused_ones(family, case, tmp_path):
    options = dict(CASES[case])
    leaves = [OLD[family][i] for i in options.pop("leaves")]
    wanted = old_adapter(family, tmp_path, leaves, **options)(IDS).logits
    model = PeftModel.from_pretrained(build(family), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, build(family)(IDS).logits, atol=1e-2)

    model.save_pretrained(tmp_path / "fused")
    keys = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert any("experts" in k for k in keys) and not any(".experts.0." in k for k in keys)
    again = PeftModel.from_pretrained(build(family), tmp_path / "fused")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_router_that_was_a_linear_layer_comes_along(tmp_path):
    wanted = old_adapter("mixtral", tmp_path, ["w1", "w2", "w3", "gate"])(IDS).logits
    model = PeftModel.from_pretrained(build("mixtral"), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_an_old_adapter_is_added_to_others_and_trains_on(tmp_path):
    wanted = old_adapter("qwen3_moe", tmp_path, ["gate_proj", "up_proj", "down_proj"])(IDS).logits
    model = get_peft_model(build("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.load_adapter(tmp_path, "old", is_trainable=True)
    model.set_adapter("old")
    torch.testing.assert_close(model.eval()(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    stacks = [p for n, p in model.named_parameters() if "experts" in n and "old" in n]
    assert stacks and all(p.grad.any() for p in stacks)


def test_what_has_no_fused_form_is_refused(tmp_path):
    old_adapter("mixtral", tmp_path, ["w1"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    base = build("mixtral")
    with pytest.raises(ValueError, match="use_dora, which has no form for the fused experts of MixtralForCausalLM"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any("adapters" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("change", ["rank", "expert"])
def test_an_old_adapter_of_another_model_is_refused(tmp_path, change):
    old_adapter("mixtral", tmp_path, ["w1", "w2", "w3"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.3.w1.lora_A.weight"
    if change == "rank":
        tensors[key] = torch.zeros(3, 17)
    else:
        tensors |= {k.replace("experts.3", "experts.9"): v.clone() for k, v in tensors.items() if "experts.3" in k}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"fits no expert of MixtralForCausalLM \(4 experts, 16 -> "):
        PeftModel.from_pretrained(build("mixtral"), tmp_path)


# ---- stacks that were stored turned ---------------------------------------------------------------------------------
def qwen3_vl(moe: int = 12):
    """A text-only stand-in: a model type whose stacks transformers 4 stored as (experts, in, out)."""
    make, config, own = MODELS["qwen3_moe"]
    torch.manual_seed(0)
    model = make(config(**SIZES, **(own | {"moe_intermediate_size": moe}))).eval()
    model.config.model_type = "qwen3_vl_moe"
    for name, parameter in model.named_parameters():
        if "experts." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def turned(folder, both: bool, moe: int) -> Tensor:
    """Write an adapter over stacks (experts, in, out), and return the logits it stands for."""
    names = STACKS if both else STACKS[1:]
    model = get_peft_model(qwen3_vl(moe), LoraConfig(r=2, target_modules=[], target_parameters=names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors, out = load_file(file), {}
    for key in [k for k in tensors if "lora_A" in k]:
        a, b = tensors[key].reshape(4, 2, -1), tensors[key.replace("lora_A", "lora_B")].reshape(-1, 2, 4)
        out[key] = b.permute(2, 1, 0).reshape(8, -1).contiguous()  # A'_e = B_e^T
        out[key.replace("lora_A", "lora_B")] = a.permute(2, 1, 0).reshape(-1, 8).contiguous()  # B'_e = A_e^T
    save_file(out, file)
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_an_adapter_of_turned_stacks_is_turned(tmp_path):
    wanted = turned(tmp_path, both=True, moe=12)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(qwen3_vl(), tmp_path)(IDS).logits, wanted)


def test_square_stacks_are_told_by_their_neighbour_or_refused(tmp_path):
    wanted = turned(tmp_path / "both", both=True, moe=16)
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(qwen3_vl(16), tmp_path / "both")(IDS).logits, wanted)
    turned(tmp_path / "one", both=False, moe=16)
    with pytest.raises(ValueError, match="cannot be told; name both gate_up_proj and down_proj"):
        PeftModel.from_pretrained(qwen3_vl(16), tmp_path / "one")
