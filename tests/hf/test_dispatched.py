"""Models that accelerate spread over devices, or parked on the CPU or disk until a layer is called."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch

from hf.test_model import IDS, llama, logits, options, stir
from veneer import LoraConfig, PeftModel, get_peft_model


def parked(tmp_path: Path, where: str) -> torch.nn.Module:
    if where == "cpu":
        return accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    return accelerate.disk_offload(llama(), str(tmp_path / "weights"), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_adapters_on_a_parked_model_equal_those_on_a_plain_one(tmp_path: Path, where: str, more: dict) -> None:
    config = options(target_modules="all-linear", task_type="CAUSAL_LM") | more
    plain = get_peft_model(llama(), LoraConfig(**config))
    stir(plain)
    plain.eval().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(parked(tmp_path, where), tmp_path / "adapter")
    assert not any(p.device.type == "meta" for n, p in model.named_parameters() if "lora" in n)
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)
    with pytest.raises(ValueError, match="offload"):
        model.base_model.merge_adapter()
    assert torch.allclose(logits(model), logits(plain), atol=1e-6)


def test_dispatching_after_the_adapter_was_added() -> None:
    model = get_peft_model(llama(), LoraConfig(**options(task_type="CAUSAL_LM"))).eval()
    expected = logits(model)
    accelerate.dispatch_model(model.base_model.model, {"": "cpu"}, force_hooks=True)
    assert torch.allclose(logits(model), expected, atol=1e-6)


def test_training_over_a_parked_model(tmp_path: Path) -> None:
    model = get_peft_model(parked(tmp_path, "cpu"), LoraConfig(r=4, task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
