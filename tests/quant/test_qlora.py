"""QLoRA as people run it: through transformers and bitsandbytes, or through our own NF4; beside the peer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf.tiny import IDS, llama
from quant.layers import HAS_BITSANDBYTES
from veneer import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training, quantize_model
from veneer.core import quant
from veneer.core.nf4_linear import Nf4Linear

needs_bnb = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
WIDE = {"hidden_size": 64, "intermediate_size": 128}
CONFIG = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def folder(tmp_path):
    llama(**WIDE).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def by_bitsandbytes(folder, bits: int = 4):
    how = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
    settings = BitsAndBytesConfig(**how.get(bits, {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"})


def steps(model, count: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_bnb
def test_ours_and_bitsandbytes_hold_the_same_numbers_and_learn_alike(folder):
    ours, theirs = quantize_model(llama(**WIDE)), by_bitsandbytes(folder)
    losses = []
    for base in (ours, theirs):
        torch.manual_seed(0)
        losses.append(steps(get_peft_model(prepare_model_for_kbit_training(base), LoraConfig(**CONFIG)).train()))
    assert losses[0] == pytest.approx(losses[1], abs=2e-3) and losses[0][-1] < 0.9 * losses[0][0]
    own, up = (base.model.layers[0].mlp.up_proj for base in (ours, theirs))
    gap = (own.dequantize() - quant.dense(up, up.weight)).abs()
    assert (gap < 1e-6).float().mean() > 0.99 and gap.max() < 1e-3 * own.dequantize().abs().max()  # ties may fall apart


@pytest.mark.parametrize("which", ["ours", pytest.param("bitsandbytes", marks=needs_bnb)])
def test_checkpointing_over_a_frozen_base_changes_no_gradient(which, folder):
    gradients = []
    for checkpointing in (False, True):
        base = quantize_model(llama(**WIDE)) if which == "ours" else by_bitsandbytes(folder)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
        assert base.is_gradient_checkpointing == checkpointing
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(**CONFIG)).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert gradients[0] and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@needs_bnb
@pytest.mark.parametrize("bits", [4, 8])
def test_the_peer_reads_and_writes_the_same_adapter_on_bitsandbytes_layers(bits, folder, tmp_path):
    import peft

    torch.manual_seed(0)
    mine = get_peft_model(by_bitsandbytes(folder, bits), LoraConfig(**CONFIG, init_lora_weights=False)).eval()
    mine.save_pretrained(tmp_path / "mine")
    y = mine(IDS).logits
    theirs = peft.PeftModel.from_pretrained(by_bitsandbytes(folder, bits), tmp_path / "mine")
    if bits == 4:  # in evaluation mode bitsandbytes would rearrange the weights under the peer
        theirs.train()
        theirs.config.use_cache = False
    else:
        theirs.eval()
    assert torch.allclose(theirs(IDS).logits, y, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(by_bitsandbytes(folder, bits), tmp_path / "theirs").eval()
    assert torch.allclose(again(IDS).logits, y, atol=1e-6)


@needs_bnb
def test_evaluation_on_a_cpu_keeps_outputs_and_gradients(folder):
    model = get_peft_model(by_bitsandbytes(folder), LoraConfig(**CONFIG, init_lora_weights=False))

    def gradient():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    before = gradient()
    y = model.eval()(IDS).logits
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, y, atol=1e-6)
    assert torch.allclose(gradient(), before, atol=1e-6)


def test_the_casts_of_the_preparation_can_be_seen_and_left_out():
    base = quantize_model(llama(**WIDE).bfloat16())
    same = prepare_model_for_kbit_training(copy.deepcopy(base), cast_to_float32=False)
    assert same.model.norm.weight.dtype == same.lm_head.weight.dtype == torch.bfloat16
    cast = prepare_model_for_kbit_training(base)
    assert cast.model.norm.weight.dtype == cast.lm_head.weight.dtype == torch.float32
    assert cast.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    model = get_peft_model(cast, LoraConfig(**CONFIG))
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("which", ["ours", pytest.param("bitsandbytes", marks=needs_bnb)])
def test_merged_and_unloaded_it_is_an_ordinary_model_that_saves(which, folder, tmp_path):
    base = quantize_model(llama(**WIDE)) if which == "ours" else by_bitsandbytes(folder)
    model = get_peft_model(base, LoraConfig(**CONFIG, init_lora_weights=False)).eval()
    y = model(IDS).logits
    with pytest.warns(UserWarning, match="made dense"):
        merged = model.merge_and_unload()
    assert not any(type(m).__name__ in ("Nf4Linear", "Linear4bit") for m in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(again(IDS).logits, y, atol=1e-4)


def test_merged_into_the_original_weights_of_a_folder(folder):
    dense = llama(**WIDE)
    torch.manual_seed(0)
    plain = get_peft_model(copy.deepcopy(dense), LoraConfig(**CONFIG, init_lora_weights=False)).eval()
    torch.manual_seed(0)
    model = get_peft_model(quantize_model(dense), LoraConfig(**CONFIG, init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="original weights plus the change"):
        merged = model.merge_and_unload(quantized=str(folder))
    assert torch.allclose(merged(IDS).logits, plain(IDS).logits, atol=1e-5)


def test_packed_again_it_stays_packed():
    model = get_peft_model(quantize_model(llama(**WIDE)), LoraConfig(**CONFIG, init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="packed again"):
        merged = model.merge_and_unload(quantized="requantize")
    assert type(merged.model.layers[0].self_attn.q_proj) is Nf4Linear and merged.is_quantized


def test_a_packed_model_counts_the_weights_it_stands_for():
    dense = get_peft_model(llama(**WIDE), LoraConfig(**CONFIG)).get_nb_trainable_parameters()
    assert get_peft_model(quantize_model(llama(**WIDE)), LoraConfig(**CONFIG)).get_nb_trainable_parameters() == dense


@needs_bnb
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("model_dtype", "compute"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_merge_leaves_the_models_dtype_whatever_the_layers_computed_in(bits, model_dtype, compute, folder):
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": getattr(torch, compute)}
    settings = BitsAndBytesConfig(**(kind if bits == 4 else {"load_in_8bit": True}))
    dtype = getattr(torch, model_dtype)
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=dtype, device_map={"": "cpu"}
    )
    model = get_peft_model(base, LoraConfig(**CONFIG)).eval()
    y = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        assert torch.allclose(model(IDS).logits, y, atol=0.02)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert type(merged.model.layers[0].mlp.up_proj) is type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.allclose(merged(IDS).logits, y, atol=0.02)
