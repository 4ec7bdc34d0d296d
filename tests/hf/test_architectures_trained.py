"""Adapters on models of other tasks and with several towers: trained, saved, loaded and merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from hf import tiny
from veneer import LoraConfig, PeftModel, get_peft_model

DRAW = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 16, (2, 6), generator=DRAW)
BERT = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3,
}  # fmt: skip
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def llava() -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=31, vision_feature_layer=-1
    )
    return seeded(lambda: LlavaForConditionalGeneration(config))


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope, "rope_scaling": rope},
        vision_config=vision,
        image_token_id=31,
        vision_start_token_id=30,
        vision_end_token_id=29,
        video_token_id=28,
    )
    return seeded(lambda: Qwen2VLForConditionalGeneration(config))


def with_image(image: list[int], **pixels: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor([[1, *image, 5, 6, 7], [1, *image, 8, 9, 10]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


LLAVA = with_image([31] * 4, pixel_values=torch.randn(2, 3, 8, 8, generator=DRAW))
QWEN = with_image(
    [30, *[31] * 4, 29],
    pixel_values=torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=DRAW),
    image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]),
)
QWEN["mm_token_type_ids"] = (QWEN["input_ids"] == 31).long()


@dataclass
class Case:
    """A model, what it is given and asked to learn, and where the adapter is to be (and nowhere else)."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    labels: Tensor
    config: dict[str, Any]
    inside: str
    count: int


CASES = {
    "T5, both stacks": Case(
        tiny.t5, {"input_ids": IDS}, IDS, {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}, "", 16
    ),
    "T5, cross attention of the decoder": Case(
        tiny.t5,
        {"input_ids": IDS},
        IDS,
        {"target_modules": r"decoder\..*EncDecAttention\.[qkvo]", "task_type": "SEQ_2_SEQ_LM"},
        "EncDecAttention",
        8,
    ),
    "BERT, a class for each text": Case(
        lambda: seeded(lambda: BertForSequenceClassification(BertConfig(**BERT))),
        {"input_ids": IDS},
        torch.tensor([0, 2]),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
        "attention",
        4,
    ),
    "BERT, a class for each token, all linear layers": Case(
        lambda: seeded(lambda: BertForTokenClassification(BertConfig(**BERT))),
        {"input_ids": IDS},
        IDS % 3,
        {"target_modules": "all-linear", "task_type": "TOKEN_CLS"},
        "bert",
        12,
    ),
    "LLaVA, the text tower by a regular expression": Case(
        llava,
        LLAVA,
        LLAVA["input_ids"],
        {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
        "language_model",
        4,
    ),
    "LLaVA, the image tower by leaving the text out": Case(
        llava,
        LLAVA,
        LLAVA["input_ids"],
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*language_model.*"},
        "vision_tower",
        4,
    ),
    "LLaVA, the projector as a whole with the text tower": Case(
        llava,
        LLAVA,
        LLAVA["input_ids"],
        {"target_modules": r".*language_model.*\.q_proj", "modules_to_save": ["multi_modal_projector"]},
        "language_model",
        2,
    ),
    "Qwen2-VL, the text tower": Case(
        qwen2_vl,
        QWEN,
        QWEN["input_ids"],
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "exclude_modules": ["visual"]},
        "language_model",
        8,
    ),
    "Qwen2-VL, the image tower": Case(
        qwen2_vl, QWEN, QWEN["input_ids"], {"target_modules": r".*visual\.blocks.*\.(qkv|fc1|fc2)"}, "visual", 6
    ),
}


def logits(model: nn.Module, case: Case) -> Tensor:
    two_stacks = case.config.get("task_type") == "SEQ_2_SEQ_LM"
    labels = {"decoder_input_ids": case.labels} if two_stacks else {}
    with torch.no_grad():
        return model.eval()(**case.inputs, **labels).logits


@pytest.mark.parametrize("name", CASES)
def test_trained_saved_loaded_and_merged(name, tmp_path):
    case = CASES[name]
    torch.manual_seed(1)
    model = get_peft_model(case.make(), LoraConfig(r=4, lora_alpha=16, **case.config))
    places = {n.partition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert len(places) == case.count and all(case.inside in place for place in places)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(16):
        loss = model.train()(**case.inputs, labels=case.labels).loss
        loss.backward()
        optimiser.step()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimiser.zero_grad()
        losses.append(loss.item())
    assert min(losses) < 0.98 * losses[0]
    wanted = logits(model, case)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(case.make(), tmp_path), case), wanted)
    torch.testing.assert_close(logits(model.merge_and_unload(), case), wanted, rtol=1e-4, atol=1e-5)


def test_a_tower_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"matches target_modules='\.\*audio_tower"):
        get_peft_model(llava(), LoraConfig(target_modules=r".*audio_tower.*\.q_proj"))
    with pytest.raises(ValueError, match=r"exclude_modules=\['visual_tower'\]; nearest names: vision_tower"):
        get_peft_model(llava(), LoraConfig(target_modules=["q_proj"], exclude_modules=["visual_tower"]))
