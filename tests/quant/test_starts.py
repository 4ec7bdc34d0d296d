"""LoftQ and QPiSSA with a base that is quantised for real, and LoftQ for a base that is quantised already."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hf.tiny import IDS, llama
from veneer import LoraConfig, get_peft_model, quantize_model, quantize_with_adapter, replace_lora_weights_loftq
from veneer.core.nf4_linear import Nf4Linear
from veneer.methods.lora_quantised import STARTS, rounded
from veneer.ops.nf4_bytes import Layout


def decaying(n: int = 256) -> torch.Tensor:
    """Singular values from 1 to 10^-1.5."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    return u @ torch.diag(torch.logspace(0, -1.5, n)) @ v.T


def nuclear(x: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(x).sum())


def test_the_errors_fall_as_published():
    w = decaying()
    layout = Layout((256, 256), double=False)
    alone = nuclear(w - rounded(w, layout))
    ratios = {}
    for start, rounds in [("loftq", t) for t in (1, 2, 3, 4, 5)] + [("qpissa", 1), ("qpissa", 5)]:
        a, b, base = STARTS[start](w, 32, 2.0, rounds, layout)
        ratios[start, rounds] = nuclear(w - rounded(base, layout) - 2.0 * b @ a) / alone
    published = (0.743, 0.676, 0.654, 0.642, 0.634)
    assert [ratios["loftq", t] for t in (1, 2, 3, 4, 5)] == pytest.approx(published, abs=0.02)
    assert ratios["qpissa", 1] == pytest.approx(0.646, abs=0.02)
    assert ratios["qpissa", 5] == pytest.approx(0.451, abs=0.02)


@pytest.mark.parametrize("start", ["qpissa", "loftq"])
def test_a_model_is_quantised_with_its_adapter_and_starts_nearer_to_the_float_one(start):
    dense = llama(hidden_size=64, intermediate_size=128)
    expected, alone = dense(IDS).logits, quantize_model(llama(hidden_size=64, intermediate_size=128))(IDS).logits
    model = get_peft_model(dense, LoraConfig(r=16, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM"))
    errors = quantize_with_adapter(model, start)
    assert len(errors) == 14 and all(e.start < 0.8 * e.quantised for e in errors.values())
    assert {type(h.get_base_layer()) for h in model.base_model.hosts()} == {Nf4Linear}
    assert (model(IDS).logits - expected).norm() < 0.9 * (alone - expected).norm()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_layers_without_the_adapter_are_quantised_too_and_the_pair_survives_files(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    quantize_with_adapter(model)
    y = model(IDS).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    assert type(base.model.layers[0].mlp.up_proj) is type(base.model.layers[0].self_attn.q_proj) is Nf4Linear
    again = quantize_model(llama())
    again.load_state_dict(base.state_dict())
    from veneer import PeftModel

    assert torch.equal(PeftModel.from_pretrained(again, tmp_path)(IDS).logits, y)


def test_an_adapter_that_has_started_is_refused():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="init_lora_weights=True"):
        quantize_with_adapter(model)
    packed = get_peft_model(quantize_model(llama()), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="on a float linear layer"):
        quantize_with_adapter(packed)
    with pytest.raises(ValueError, match="'loftq' or 'qpissa'"):
        quantize_with_adapter(packed, "qolora")


def test_loftq_for_a_base_that_is_packed_already(tmp_path):
    dense = llama()
    expected = dense(IDS).logits
    save_file({k: v.clone() for k, v in dense.state_dict().items() if "lm_head" not in k}, tmp_path / "m.safetensors")
    model = get_peft_model(quantize_model(llama()), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = (model(IDS).logits - expected).norm()
    seen = []
    replace_lora_weights_loftq(model, tmp_path, callback=lambda m, path: seen.append(path) or True)
    assert len(seen) == 14 and (model(IDS).logits - expected).norm() < 0.7 * before
    replace_lora_weights_loftq(model, tmp_path, callback=lambda m, path: False)  # each change is taken back
    assert (model(IDS).logits - expected).norm() < 0.7 * before
