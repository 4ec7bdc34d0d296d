"""The documented workflow: PEFT's example flags, the config directory, and the script around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli.main import main
from veneer.train import adapters
from veneer.train.foreign import translate

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))


def unordered(value):
    return sorted(value) if isinstance(value, list | set) else value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_as_its_class_takes_it(path):
    values = json.loads(path.read_text())
    cls = adapters.table().get(values["peft_type"])
    if cls is None:
        pytest.skip(f"{values['peft_type']} is not registered yet")
    assert adapters.problems({"path": str(path)}) == []
    built = cls(**values)
    again = cls(**{k: v for k, v in built.to_dict().items() if k != "peft_type"})
    assert again.to_dict() == built.to_dict()
    kept = built.to_dict()
    assert {key: unordered(kept[key]) for key in values} == {key: unordered(value) for key, value in values.items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one_for_peft_too(path):
    peft = pytest.importorskip("peft")
    values = json.loads(path.read_text())
    cls = {str(k.value): v for k, v in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}[values["peft_type"]]
    assert cls(**values).peft_type.value == values["peft_type"]


def test_the_users_rank_4_config_is_as_they_have_it():
    values = json.loads((ROOT / "configs" / "lora_llama2_7b_rank4.json").read_text())
    assert (values["r"], values["lora_alpha"], values["lora_dropout"], values["bias"]) == (4, 8, 0.1, "none")
    assert values["task_type"] == "CAUSAL_LM"
    assert values["inference_mode"] is True
    assert sorted(values["target_modules"]) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def example_flags(base, facts, out):
    return {
        "seed": "100", "model_name_or_path": str(base), "dataset_name": str(facts), "chat_template_format": "none",
        "add_special_tokens": "False", "append_concat_token": "False", "splits": "train", "max_length": "128",
        "num_train_epochs": "1", "max_steps": "2",
        "logging_steps": "5", "log_level": "info", "logging_strategy": "steps",
        "eval_strategy": "epoch", "save_strategy": "epoch", "push_to_hub": "False", "hub_private_repo": "True",
        "hub_strategy": "every_save", "bf16": "False", "packing": "False", "learning_rate": "1e-4",
        "lr_scheduler_type": "cosine", "weight_decay": "1e-4", "warmup_ratio": "0.0", "max_grad_norm": "1.0",
        "output_dir": str(out), "per_device_train_batch_size": "2", "per_device_eval_batch_size": "2",
        "gradient_accumulation_steps": "2", "gradient_checkpointing": "True", "use_reentrant": "False",
        "dataset_text_field": "content", "use_peft_lora": "True", "lora_r": "8", "lora_alpha": "16",
        "lora_dropout": "0.1",
        "lora_target_modules": "all-linear", "use_4bit_quantization": "False", "use_nested_quant": "True",
        "bnb_4bit_compute_dtype": "float32", "use_flash_attn": "True", "report_to": "none",
    }  # fmt: skip


def test_every_flag_of_the_example_is_taken_and_explained(base, facts, tmp_path):
    done = translate(example_flags(base, facts, tmp_path))
    assert done.sets["adapter.target_modules"] == "all-linear"
    assert done.sets["train.warmup"] == "0.0"
    assert done.sets["data.train"] == [str(facts)]
    text = "\n".join(done.notices)
    for flag in ("use_reentrant", "add_special_tokens", "log_level", "use_flash_attn", "chat_template_format"):
        assert flag in text
    assert "no text column 'content'" in text
    assert "model.quantize" not in done.sets


def test_the_example_script_trains_with_its_flags(base, facts, tmp_path, capsys):
    flags = example_flags(base, facts, tmp_path / "out")
    main(["sft", *(f"--{key}={value}" for key, value in flags.items())])
    out = capsys.readouterr().out
    assert "has no effect" in out
    assert "held-out loss" in out
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (8, 16, 0.1)


def test_unknown_flags_are_refused_together_with_suggestions():
    with pytest.raises(
        ValueError, match=r"no flags --lora_rnk \(did you mean --lora_r.*--modle_name_or_path \(did you mean"
    ):
        translate({"lora_rnk": 3, "modle_name_or_path": "x"})


def test_full_fine_tuning_is_refused():
    with pytest.raises(ValueError, match="training all weights"):
        translate({"use_peft_lora": "False"})


def test_splits_of_a_folder_are_its_files(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "notes.md"):
        (tmp_path / name).write_text("{}")
    done = translate({"dataset_name": str(tmp_path), "splits": "train,test"})
    assert done.sets["data.train"] == [str(tmp_path / "train.jsonl")]
    assert done.sets["data.eval"] == [str(tmp_path / "test.jsonl")]


def script(base, out, data):
    config = ROOT / "configs" / "lora_llama2_7b_rank4.json"
    words = ["--model_path", str(base), "--dataset_name", str(data), "--config", str(config), "--output_dir", str(out)]
    return ["train-with-config", *words, "--num_epochs", "1", "--batch_size", "8"]


def test_the_script_shows_the_plan_and_runs_it_only_when_told(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    alpaca = tmp_path / "alpaca data.json"
    rows = [{"instruction": f"What colour is the sky {i}", "input": "", "output": "blue"} for i in range(24)]
    alpaca.write_text(json.dumps(rows))
    words = script(base, tmp_path / "out", alpaca)
    main(words)
    out = capsys.readouterr().out
    assert "inference_mode: true" in out
    assert "4,096 trainable" in out
    assert "veneer train --model.path=" in out
    assert f"'--data.train=[\"{alpaca}\"]'" in out
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as end:
        main([*words, "--execute"])
    assert end.value.code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_script_passes_words_and_exit_code_on_unchanged(base, facts, tmp_path, monkeypatch):
    seen = []

    def run(words, **options):
        seen.append((words, options))
        return subprocess.CompletedProcess(words, 7)

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "a; rm -rf b"
    with pytest.raises(SystemExit) as end:
        main([*script(base, out, facts), "--execute"])
    assert end.value.code == 7
    assert f"--output.dir={out}" in seen[0][0]
    assert not seen[0][1].get("shell")
