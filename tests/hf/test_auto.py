"""AutoPeftModel: from an adapter's folder alone to the model it was trained on, with the adapter on it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import veneer
from veneer import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModelForCausalLM,
    get_peft_model,
)
from veneer.hf import auto

from .tiny import IDS, llama, t5, tokenizer


@pytest.fixture
def saved(tmp_path):
    """(folder of an adapter of a tiny Llama on disk, its logits)."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "adapter", train(tmp_path)


def train(tmp_path, rows: int | None = None, **options):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if rows:
        base.resize_token_embeddings(rows)
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    model.save_pretrained(tmp_path / "adapter")
    return model(IDS).logits


def edit(folder, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("cls", [AutoPeftModel, AutoPeftModelForCausalLM])
def test_the_folder_is_enough(saved, cls) -> None:
    folder, y = saved
    model = cls.from_pretrained(folder)
    assert isinstance(model, PeftModelForCausalLM)
    assert torch.equal(model(IDS).logits, y)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_the_other_arguments_go_where_they_belong(saved) -> None:
    folder, _ = saved
    model = AutoPeftModelForCausalLM.from_pretrained(
        str(folder), adapter_name="mine", is_trainable=True, dtype=torch.bfloat16, autocast_adapter_dtype=False
    )
    assert model.active_adapters == ["mine"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "SEQ_CLS"])
def test_other_tasks(tmp_path, task) -> None:
    if task == "SEQ_2_SEQ_LM":
        base, cls, target = t5(), AutoPeftModelForSeq2SeqLM, "q"
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    else:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
        )
        base, cls, target = (
            BertForSequenceClassification(config).eval(),
            AutoPeftModelForSequenceClassification,
            "query",
        )
        inputs = {"input_ids": IDS}
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=[target], task_type=task, init_lora_weights=False)
    model = get_peft_model(base, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    kwargs = {"num_labels": 3} if task == "SEQ_CLS" else {}
    again = cls.from_pretrained(tmp_path / "adapter", **kwargs)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_the_wrong_class_names_the_right_one(saved) -> None:
    with pytest.raises(ValueError, match=r"is for CAUSAL_LM.*use AutoPeftModelForCausalLM"):
        AutoPeftModelForSeq2SeqLM.from_pretrained(saved[0])


def test_there_is_a_class_for_every_task() -> None:
    assert {c.task for c in auto.CLASSES} == {str(t) for t in veneer.TaskType}


def test_without_a_task_the_mapping_names_the_class(saved) -> None:
    folder, y = saved
    edit(
        folder, task_type=None, auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
    )
    assert torch.equal(AutoPeftModel.from_pretrained(folder)(IDS).logits, y)


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"base_model_class": "system", "parent_library": "os"}, "library 'os'.*nothing was imported"),
        ({"base_model_class": "X", "parent_library": "transformers_evil.sub"}, "none of transformers"),
        ({"base_model_class": "logging", "parent_library": "transformers"}, "no model class 'logging'"),
        (None, "neither a task_type nor an auto_mapping"),
    ],
)
def test_a_config_cannot_choose_what_is_imported(saved, mapping, says) -> None:
    edit(saved[0], task_type=None, auto_mapping=mapping)
    with pytest.raises(ValueError, match=says):
        AutoPeftModel.from_pretrained(saved[0])


def test_a_config_without_a_base_says_what_to_do(saved) -> None:
    edit(saved[0], base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"names no base model.*PeftModel\.from_pretrained"):
        AutoPeftModelForCausalLM.from_pretrained(saved[0])


def test_it_is_not_made_by_hand() -> None:
    with pytest.raises(OSError, match="from_pretrained"):
        AutoPeftModelForCausalLM("x")


def test_a_longer_tokenizer_beside_the_adapter_sets_the_vocabulary(saved) -> None:
    folder, _ = saved
    tokenizer(extra=("new", "newer")).save_pretrained(folder)
    assert AutoPeftModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] == 18


def test_a_shorter_tokenizer_does_not_cut_a_padded_table(tmp_path) -> None:
    llama(vocab_size=32).save_pretrained(tmp_path / "base")
    y = train(tmp_path)
    tokenizer().save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(model(IDS).logits, y)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_a_table_in_the_file_sets_the_vocabulary(tmp_path, options) -> None:
    llama().save_pretrained(tmp_path / "base")
    y = train(tmp_path, rows=24, **options)
    tokenizer(extra=("new",)).save_pretrained(tmp_path / "adapter")  # 17 tokens in a table padded to 24
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(model(IDS).logits, y)
