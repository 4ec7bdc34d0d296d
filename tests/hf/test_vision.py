"""Image classifiers: the example's claim on real images, and what its adapters do on disk and merged."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from veneer import LoraConfig, PeftModel, get_peft_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision" / "new_digits.py"
spec = importlib.util.spec_from_file_location("new_digits", EXAMPLE)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_lora_learns_digits_that_a_new_head_alone_cannot(model):
    found = example.compare(model, "digits", epochs=10, base_epochs=15)
    assert found["base on 0-4"] > 0.9
    assert found["LoRA and head on 5-9"] > 0.8
    assert found["LoRA and head on 5-9"] > found["head alone on 5-9"] + 0.15
    assert found["trained by LoRA"] < 0.3 * found["parameters"]


@pytest.mark.parametrize("model", ["vit", "resnet"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_of_convolutions_and_attention_are_saved_and_merged(model, options, tmp_path):
    torch.manual_seed(0)
    base, images = example.classifier(model, 8).eval(), torch.randn(6, 1, 8, 8)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    config = LoraConfig(r=4, target_modules=example.targets(model), modules_to_save=["classifier"], **options)
    adapted = get_peft_model(base, config)
    example.learn(adapted, images, torch.arange(6) % 5, 2, 1e-2)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in adapted.parameters())
    wanted = adapted.eval()(pixel_values=images).logits
    adapted.save_pretrained(tmp_path)
    again = example.classifier(model, 8)
    again.load_state_dict(state)
    running = {k: v for k, v in base.state_dict().items() if "running" in k or "num_batches" in k}
    again.load_state_dict(running, strict=False)  # batch norm's statistics are the base's own
    torch.testing.assert_close(PeftModel.from_pretrained(again, tmp_path)(pixel_values=images).logits, wanted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(pixel_values=images).logits, wanted, rtol=1e-4, atol=1e-5)
