"""transformers' Trainer and TRL over veneer, with and without the name ``peft``.

Run by ``test_trainer`` in processes of their own: which of the two holds is decided when the Trainer is first imported.
"""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import veneer
from veneer import LoraConfig, PeftModel, get_peft_model

from .tiny import llama, t5, tokenizer

ALIAS = getattr(sys.modules.get("peft"), "LoraConfig", None) is veneer.LoraConfig


class Rows(Dataset):
    """Sixteen rows that count upwards in the vocabulary, of the two lengths 5 and 7 where asked for."""

    def __init__(self, uneven: bool = False):
        self.rows = []
        for i in range(16):
            ids = [4 + (i + j) % 12 for j in range(7 if uneven and i % 2 else 5)]
            self.rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


def arguments(folder, cls=TrainingArguments, **options):
    settings = {
        "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 5e-2, "save_steps": 4, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return cls(output_dir=str(folder), **(settings | options))


def causal(**options) -> PeftModel:
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    return get_peft_model(llama(), LoraConfig(**settings))


def trainer(folder, model=None, **options) -> Trainer:
    return Trainer(
        model=causal() if model is None else model,
        args=arguments(folder, **options),
        train_dataset=Rows(),
        eval_dataset=Rows() if options.get("eval_strategy") else None,
        data_collator=collate,
    )


def collate(rows: list[dict]) -> dict:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def trained_tensors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_process_is_the_one_that_was_asked_for(request) -> None:
    from transformers.utils import is_peft_available

    if ALIAS:
        assert is_peft_available() and type(sys.modules["peft"]).__name__ == "PeftFace"
        assert not any(getattr(m, "__file__", None) and "/peft/" in m.__file__ for m in list(sys.modules.values()))


def test_training_learns_and_moves_the_adapter_alone(tmp_path) -> None:
    model = causal()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, model, max_steps=16)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, use_reentrant) -> None:
    plain = trainer(tmp_path / "a", save_strategy="no")
    plain.train()
    saving = trainer(
        tmp_path / "b",
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    recomputed = []
    layer = saving.model.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *a: recomputed.append(1))
    saving.train()
    assert len(recomputed) == 16  # eight steps, each forward run twice
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-5)


def test_checkpoints_hold_the_adapter_and_are_adapters(tmp_path) -> None:
    run = trainer(tmp_path)
    run.train()
    folder = tmp_path / "checkpoint-8"
    names = {path.name for path in folder.iterdir()}
    if not ALIAS:  # the Trainer does not know the model's kind and saves all of it
        assert "model.safetensors" in names
        return
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert "model.safetensors" not in names
    assert all("lora_" in key for key in load_file(folder / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(llama(), folder)
    batch = collate([Rows()[0]])
    run.model.eval()
    assert torch.equal(again(**batch).logits, run.model(**batch).logits)


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts")
    first.add_callback(StopAfter(4))
    first.train()
    second = trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 8
    assert losses(first)[:4] + losses(second)[4:] == pytest.approx(losses(whole), abs=1e-6)
    for name, value in trained_tensors(second.model).items():
        assert torch.allclose(value, trained_tensors(whole.model)[name], atol=1e-6), name


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            control.should_save = control.should_training_stop = True
        return control


def test_the_best_model_is_loaded_at_the_end(tmp_path) -> None:
    """The learning rate ruins the adapter after a few steps, so that the best checkpoint is not the last."""
    run = trainer(
        tmp_path,
        max_steps=6,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.05,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # "best" is here the worst, which is the first: it must come back
        save_total_limit=3,
    )
    run.train()
    evaluations = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.state.best_model_checkpoint.endswith("checkpoint-2") and evaluations[0] > evaluations[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluations[0], abs=1e-5)


def test_the_final_model_is_saved_and_comes_back(tmp_path) -> None:
    run = trainer(tmp_path, save_strategy="no")
    run.train()
    batch = collate([Rows()[3]])
    run.model.eval()
    run.model.save_pretrained(tmp_path / "final")
    assert torch.equal(
        PeftModel.from_pretrained(llama(), tmp_path / "final")(**batch).logits, run.model(**batch).logits
    )


def test_prediction_and_accumulation(tmp_path) -> None:
    run = trainer(tmp_path, save_strategy="no", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    run.train()
    predicted = run.predict(Rows())
    assert predicted.predictions.shape == (16, 5, 16) and predicted.metrics["test_loss"] < 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_t5_with_its_collator_trains_predicts_and_generates(tmp_path, use_reentrant) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(t5(), config)
    words = tokenizer()
    run = Seq2SeqTrainer(
        model=model,
        args=arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            predict_with_generate=True,
            max_steps=12,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        ),
        train_dataset=Rows(uneven=True),
        eval_dataset=Rows(uneven=True),
        processing_class=words,
        data_collator=DataCollatorForSeq2Seq(words, model=model),
    )
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.1
    predicted = torch.tensor(run.predict(Rows(uneven=True), max_new_tokens=4).predictions)
    model.eval()
    ids = torch.tensor([Rows(uneven=True)[0]["input_ids"]])
    assert torch.equal(predicted[:1, :5], model.generate(input_ids=ids, max_new_tokens=4))
    if ALIAS:
        again = PeftModel.from_pretrained(t5(), tmp_path / "checkpoint-12")
        batch = DataCollatorForSeq2Seq(words, model=again)([dict(Rows(uneven=True)[i]) for i in (0, 1)])
        model.eval()
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_several_adapters_are_saved_and_resumed(tmp_path) -> None:
    model = causal()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    run = trainer(tmp_path, model, max_steps=4)
    run.train()
    if not ALIAS:
        return
    assert (tmp_path / "checkpoint-4" / "other" / "adapter_model.safetensors").is_file()
    saved = trained_tensors(model)
    fresh = causal()
    fresh.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    fresh.set_adapter("other")
    more = trainer(tmp_path, fresh, max_steps=6)
    start = Snapshot()
    more.add_callback(start)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 6 and more.model.active_adapters == ["other"]
    assert start.tensors.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in start.tensors.items())


class Snapshot(TrainerCallback):
    """The trained tensors as training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.tensors = trained_tensors(model)


def test_heads_train_and_are_saved(tmp_path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    def base():
        torch.manual_seed(0)
        settings = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(intermediate_size=16, num_labels=3, **settings))

    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    rows = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(Rows())]
    run = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows, data_collator=collate)
    run.train()
    run.model.eval()
    run.model.save_pretrained(tmp_path / "final")
    batch = collate(rows[:2])
    again = PeftModel.from_pretrained(base(), tmp_path / "final")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert any("classifier" in key for key in load_file(tmp_path / "final" / "adapter_model.safetensors"))


@pytest.mark.skipif(not ALIAS, reason="TRL asks for peft")
@pytest.mark.parametrize(("target", "rate"), [("all-linear", 2e-2), (["q_proj", "down_proj"], 5e-2)])
def test_sft_by_trl(tmp_path, target, rate) -> None:
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    table = Table.from_list([{"prompt": "a b c", "completion": " d e f g h"}] * 16)
    run = SFTTrainer(
        model=llama(),
        args=arguments(tmp_path, SFTConfig, bf16=False, max_length=16, learning_rate=rate),
        train_dataset=table,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=target),
    )
    assert type(run.model) is veneer.PeftModelForCausalLM
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.1
    names = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    resumed = SFTTrainer(
        model=llama(),
        args=arguments(tmp_path, SFTConfig, bf16=False, max_length=16, learning_rate=rate, max_steps=10),
        train_dataset=table,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=target),
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10 and losses(resumed)[8] < losses(run)[0]


@pytest.mark.skipif(not ALIAS, reason="TRL asks for peft")
def test_dpo_by_trl_with_the_base_as_its_reference(tmp_path) -> None:
    from datasets import Dataset as Table
    from trl import DPOConfig, DPOTrainer

    table = Table.from_list([{"prompt": "a b c", "chosen": " d e f", "rejected": " l k j"}] * 16)
    run = DPOTrainer(
        model=llama(),
        args=arguments(tmp_path, DPOConfig, bf16=False, max_length=16),
        train_dataset=table,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    run.train()
    assert losses(run)[0] == pytest.approx(0.6931, abs=1e-3)  # policy and reference start equal
    assert losses(run)[-1] < losses(run)[0] - 0.01
    assert (tmp_path / "checkpoint-8" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not ALIAS, reason="TRL asks for peft")
def test_dpo_by_trl_goes_on_from_a_trained_adapter(tmp_path) -> None:
    """TRL copies the adapter into a second, frozen one by parameter names: the reference is where training starts."""
    from datasets import Dataset as Table
    from trl import DPOConfig, DPOTrainer

    model = causal(init_lora_weights=False)
    table = Table.from_list([{"prompt": "a b c", "chosen": " d e f", "rejected": " l k j"}] * 16)
    run = DPOTrainer(
        model=model,
        args=arguments(tmp_path, DPOConfig, bf16=False, max_length=16, max_steps=4),
        train_dataset=table,
        processing_class=tokenizer(),
    )
    (reference,) = set(model.peft_config) - {"default"}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if f".{reference}." in name}
    run.train()
    assert losses(run)[0] == pytest.approx(0.6931, abs=1e-4)
    assert frozen and all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in frozen.items())


@pytest.mark.skipif(not ALIAS, reason="TRL asks for peft")
def test_grpo_by_trl(tmp_path) -> None:
    from datasets import Dataset as Table
    from trl import GRPOConfig, GRPOTrainer

    options = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1, "bf16": False, "max_steps": 2}
    run = GRPOTrainer(
        model=llama(),
        args=arguments(tmp_path, GRPOConfig, save_steps=2, **options),
        train_dataset=Table.from_list([{"prompt": "a b c"}] * 16),
        processing_class=tokenizer(),
        reward_funcs=lambda completions, **kwargs: [float(len(c)) for c in completions],
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    before = trained_tensors(run.model)
    run.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained_tensors(run.model).items())
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
