"""The snippets that PEFT's users know from its documents and model cards, as they write them, on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from docs.conftest import ROOT
from hf.tiny import IDS, llama, t5, tokenizer
from veneer import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
    quantize_model,
)


def rows() -> Dataset:
    ids = [[4 + (i + j) % 12 for j in range(5 + i % 3)] for i in range(16)]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": ids})


ARGUMENTS = {
    "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "seed": 0, "dataloader_pin_memory": False, "save_strategy": "no",
}  # fmt: skip


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("task", [TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM])
def test_lora_with_the_trainer_and_its_seq2seq_collator(task, tmp_path):
    seq2seq = task == TaskType.SEQ_2_SEQ_LM
    config = LoraConfig(
        task_type=task,
        target_modules=["q", "v"] if seq2seq else ["q_proj", "k_proj", "v_proj", "o_proj"],
        inference_mode=False,
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
    )
    model = get_peft_model(t5() if seq2seq else llama(), config)
    arguments = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(output_dir=str(tmp_path), **ARGUMENTS)
    trainer = (Seq2SeqTrainer if seq2seq else Trainer)(
        model=model,
        args=arguments,
        train_dataset=rows(),
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer(), padding=True),
    )
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    seen = losses(trainer)
    assert sum(seen[-4:]) < sum(seen[:4])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(t5() if seq2seq else llama(), str(tmp_path / "adapter"))
    inputs = {"input_ids": IDS, "labels": IDS} if seq2seq else {"input_ids": IDS}
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


class MLP(nn.Module):
    def __init__(self, num_units_hidden=64):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(20, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x):
        return self.seq(x)


def test_a_custom_model_with_a_head_that_is_saved(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(256, 20)
    y = (x.sum(1) > 10).long()
    base = MLP()
    untouched = {name: p.clone() for name, p in base.named_parameters()}
    config = LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    criterion = nn.NLLLoss()
    for _ in range(120):
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    moved = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "seq.4" in name for name in moved)
    model.save_pretrained(tmp_path)
    fresh = MLP()
    fresh.load_state_dict(untouched)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x))


class Fused(nn.Module):
    """The attention of ChatGLM (``query_key_value``) or of Baichuan (``W_pack``): one linear layer for q, k and v."""

    def __init__(self, name: str, blocks: int = 3, dim: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(dim, 3 * dim), "dense": nn.Linear(dim, dim)}) for _ in range(blocks)
        )
        self.name = name

    def forward(self, x):
        for layer in self.layers:
            q, k, v = layer[self.name](x).chunk(3, dim=-1)
            x = x + layer["dense"]((q @ k.mT).softmax(-1) @ v)
        return x


@pytest.mark.parametrize("name", ["query_key_value", "W_pack"])
def test_fused_attention_is_named_by_its_layer(name):
    torch.manual_seed(0)
    base, x = Fused(name), torch.randn(2, 5, 8)
    plain = base(x)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=[name], init_lora_weights=False))
    assert {key.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for key in model.state_dict() if ".lora_" in key} == {name}
    assert model.get_nb_trainable_parameters()[0] == 3 * 4 * (8 + 24)
    tuned = model(x)
    assert not torch.allclose(tuned, plain)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    torch.testing.assert_close(model.merge_and_unload()(x), tuned)


def test_prepared_for_gradient_checkpointing_every_adapter_weight_gets_its_gradient():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    plain = grads(model)
    base = llama()
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable()
    again = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    again.load_state_dict(model.state_dict())
    checkpointed = grads(again)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


def test_prepared_a_packed_base_is_frozen_and_checkpoints():
    base = prepare_model_for_kbit_training(quantize_model(llama(), "nf4"), use_gradient_checkpointing=True)
    assert base.is_gradient_checkpointing
    assert not any(p.requires_grad for p in base.parameters())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert grads(model)


def grads(model) -> dict[str, torch.Tensor]:
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return found


def test_merge_and_unmerge_around_fast_inference():
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).eval()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.weight
    kept = weight.clone()
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, tuned)
        model.unmerge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, tuned)
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.weight, kept)


def test_inference_from_the_folder_alone(base, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    words = AutoTokenizer.from_pretrained(base)
    inputs = words("What colour is the sky", return_tensors="pt")
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").to("cpu")
    loaded.eval()
    outputs = loaded.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8)
    assert torch.equal(outputs, wanted)
    assert isinstance(words.batch_decode(outputs.numpy(), skip_special_tokens=True)[0], str)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_adapters_are_switched_by_name(tmp_path):
    for seed, name in enumerate(("first", "second")):
        base = llama()
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(llama(), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    outputs = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        assert model.active_adapter == name
        outputs[name] = model(input_ids=IDS).logits
        alone = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        assert torch.equal(outputs[name], alone(input_ids=IDS).logits)
    assert not torch.allclose(outputs["first"], outputs["second"])
    model.delete_adapter("second")
    assert list(model.peft_config) == ["first"]


def test_a_config_that_was_saved_for_inference(base, tmp_path, capsys, monkeypatch):
    """From Python it freezes, as in PEFT; ``veneer train`` sets it to train, and says so."""
    path = ROOT / "configs/lora_llama2_7b_rank4.json"
    config = LoraConfig(**json.loads(path.read_text()))
    assert get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).get_nb_trainable_parameters()[0] == 0

    from veneer.cli.main import main

    data = tmp_path / "rows.jsonl"
    data.write_text(
        "\n".join(json.dumps({"instruction": f"Say {i}", "input": "", "output": f"{i} it is"}) for i in range(24))
    )
    words = f"train --model {base} --data {data} --out {tmp_path / 'out'} --adapter {path} --steps 2 --eval.prompts 0"
    monkeypatch.setenv("COLUMNS", "200")
    main([*words.split(), "--log.progress", "plain"])
    out = "".join(capsys.readouterr())
    assert "inference_mode: true" in out
    assert "step 2/2" in out
    trained = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert (trained.r, trained.lora_alpha, trained.lora_dropout) == (4, 8, 0.1)
