"""Multitask prompt tuning: its formula, stages and task ids, and parity with the peer."""

from __future__ import annotations

import pytest
import torch

from hf.tiny import llama
from parity import needs_peer, randomise
from prompt_parity import both_ways
from veneer import MultitaskPromptTuningConfig, MultitaskPromptTuningInit, get_peft_model
from veneer.engine import checkpoint

IDS = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 11, 12]])
TASKS = torch.tensor([1, 0])
FILE = "prompt_tuning_init_state_dict_path"
SETTINGS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_ranks": 2}


@needs_peer
@pytest.mark.parametrize("base", ["llama", "t5"])
def test_parity(base, tmp_path):
    inputs = {"task_ids": TASKS} | ({"labels": torch.tensor([[4, 5, 2], [6, 7, 2]])} if base == "t5" else {})
    settings = {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2, "inputs": inputs}
    # With an encoder-decoder, the peer's generate leaves the decoder's half of the prompt out, which forward reads.
    both_ways(base, "MultitaskPromptTuningConfig", tmp_path, generates=base == "llama", **settings)


def source(folder, tasks=3):
    model = get_peft_model(llama(), MultitaskPromptTuningConfig(num_tasks=tasks, **SETTINGS)).eval()
    randomise([p for p in model.parameters() if p.requires_grad], size=0.5)
    model.save_pretrained(folder)
    return model


def test_each_row_reads_the_shared_prompt_times_its_tasks_factors():
    model = get_peft_model(llama(), MultitaskPromptTuningConfig(num_tasks=2, **SETTINGS)).eval()
    randomise([p for p in model.parameters() if p.requires_grad], size=0.5)
    own = model.base_model.prompts["default"]
    rows = [
        torch.einsum("pd,pr,rd->pd", own.prompt_embeddings, own.prefix_task_cols[t], own.prefix_task_rows[t])
        for t in TASKS
    ]
    inner = model.get_base_model()
    embeds = torch.cat([torch.stack(rows), inner.get_input_embeddings()(IDS)], 1)
    assert torch.allclose(model(IDS, task_ids=TASKS).logits, inner(inputs_embeds=embeds).logits, atol=1e-5)
    beams = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    both = model.generate(IDS, task_ids=TASKS, **beams)
    for row in (0, 1):
        alone = model.generate(IDS[row : row + 1], task_ids=TASKS[row : row + 1], **beams)
        assert torch.equal(both[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("start", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_target_task_starts_from_the_sources(start, tmp_path):
    model = source(tmp_path)
    old = checkpoint.read(tmp_path)
    config = MultitaskPromptTuningConfig(
        num_tasks=1, prompt_tuning_init=MultitaskPromptTuningInit(start), prompt_tuning_init_task=2,
        prompt_tuning_init_state_dict_path=str(tmp_path / "adapter_model.safetensors"), **SETTINGS,
    )  # fmt: skip
    target = get_peft_model(llama(), config).eval()
    new = checkpoint.tensors(target.base_model, "default")
    assert torch.equal(new["prompt_embeddings"], old["prompt_embeddings"])
    for name in ("prefix_task_cols", "prefix_task_rows"):
        expected = {"AVERAGE_SOURCE_TASKS": old[name].mean(0), "EXACT_SOURCE_TASK": old[name][2]}
        if start in expected:
            assert torch.equal(new[name][0], expected[start])
        else:
            assert not any(torch.allclose(new[name][0], task) for task in old[name])
    if start == "EXACT_SOURCE_TASK":
        y = target(IDS, task_ids=torch.zeros(2, dtype=torch.long)).logits
        assert torch.allclose(y, model(IDS, task_ids=torch.full((2,), 2)).logits, atol=1e-6)


def test_refusals(tmp_path):
    source(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    for wrong, words in (
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "starts from another run"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", FILE: "/nowhere"}, "is no file"),
        ({"prompt_tuning_init": "EXACT_SOURCE_TASK", FILE: path, "prompt_tuning_init_task": 7}, "has 3 tasks"),
        ({"prompt_tuning_init": "AVERAGE_SOURCE_TASKS", FILE: path, "num_ranks": 5}, "is needed"),
        ({"num_tasks": 0}, "num_tasks must be a positive integer"),
        ({"prompt_tuning_init": "SAMPLE_VOCAB"}, "must be one of TEXT, RANDOM"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            get_peft_model(llama(), MultitaskPromptTuningConfig(**(SETTINGS | wrong)))
    model = get_peft_model(llama(), MultitaskPromptTuningConfig(num_tasks=2, **SETTINGS))
    with pytest.raises(ValueError, match="pass task_ids"):
        model(IDS)
    with pytest.raises(ValueError, match="3 entries for a batch of 2"):
        model(IDS, task_ids=torch.tensor([0, 1, 0]))
