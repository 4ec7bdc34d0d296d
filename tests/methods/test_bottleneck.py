"""Bottleneck adapters: their formula, their places in known families, MAM, files and training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from hf.tiny import gpt2, llama, t5
from prompt_parity import bert, randomise
from veneer import BottleneckConfig, PeftModel, PrefixTuningConfig, get_peft_model
from veneer.engine.tuner import Tuner

IDS = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 11, 12]])


def places(model):
    return sorted(host.site.path for host in model.base_model.hosts())


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_it_is_the_formula(placement):
    base = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))).double()
    plain = Tuner(base)
    config = BottleneckConfig(
        target_modules=["1"], placement=placement, bottleneck_size=3, scaling=4, non_linearity="tanh"
    )
    plain.add("a", config)
    plain.set_active("a")
    randomise(plain.adapters("a").__next__()[1].parameters(), size=0.5)
    w = dict(plain.hosts()[0].adapters["a"].named_parameters())
    x = torch.randn(2, 6, dtype=torch.float64)
    read = base[0](x)
    h = base[1].base_layer(read)
    v = read if placement == "parallel" else h
    inside = torch.tanh(v @ w["bottleneck_down.weight"].T + w["bottleneck_down.bias"])
    expected = h + 4 * (inside @ w["bottleneck_up.weight"].T + w["bottleneck_up.bias"])
    assert torch.allclose(plain(x), expected, atol=1e-12)


def test_places_by_family():
    blocks = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp", "self_attn")]
    assert places(get_peft_model(llama(), BottleneckConfig(placement="houlsby", task_type="CAUSAL_LM"))) == blocks
    assert places(get_peft_model(llama(), BottleneckConfig(task_type="CAUSAL_LM"))) == blocks[::2]
    model = get_peft_model(llama(), BottleneckConfig(placement="parallel", layers_to_transform=None))
    assert places(model) == blocks[::2]
    one = BottleneckConfig(target_modules=["mlp"], layers_to_transform=[1])
    assert places(get_peft_model(llama(), one)) == blocks[2:3]
    encoder = bert(BertForSequenceClassification)
    found = places(get_peft_model(encoder, BottleneckConfig(placement="houlsby")))
    assert found == [f"bert.encoder.layer.{i}.{part}output.dense" for i in (0, 1) for part in ("attention.", "")]
    assert len(places(get_peft_model(gpt2(), BottleneckConfig(placement="houlsby")))) == 4
    assert len(places(get_peft_model(t5(), BottleneckConfig(placement="houlsby")))) == 2 * 2 + 2 * 3


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_it_starts_as_the_base_learns_saves_and_generates(build, placement, tmp_path):
    task = "SEQ_2_SEQ_LM" if build is t5 else "CAUSAL_LM"
    given = {"input_ids": IDS, "labels": IDS}
    expected = build().requires_grad_(False)(**given).logits
    model = get_peft_model(build(), BottleneckConfig(placement=placement, reduction_factor=4, task_type=task)).eval()
    assert torch.equal(model(**given).logits, expected)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(again(**given).logits, model(**given).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(IDS, **greedy), model.generate(IDS, **greedy))
    model.gradient_checkpointing_enable()
    model.train()(**given).loss.backward()
    with model.disable_adapter():
        assert torch.equal(model.eval()(**given).logits, expected)


def test_mam_is_a_prefix_and_a_parallel_bottleneck():
    model = get_peft_model(
        llama(), BottleneckConfig(placement="parallel", scaling=4, task_type="CAUSAL_LM"), "parallel"
    )
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.set_adapter(["parallel", "prefix"])
    randomise([p for p in model.parameters() if p.requires_grad])
    both = model.eval()(IDS).logits
    for name in ("parallel", "prefix"):
        model.set_adapter(name)
        assert not torch.allclose(model(IDS).logits, both, atol=1e-4)


def test_refusals():
    for wrong, words in (
        ({"placement": "middle"}, "placement must be"),
        ({"non_linearity": "sine"}, "non_linearity must be one of relu"),
        ({"scaling": "fixed"}, "a number or 'learned'"),
        ({"bottleneck_size": 0}, "bottleneck_size must be"),
        ({"reduction_factor": 0}, "reduction_factor must be positive"),
        ({"bottleneck_dropout": 1.0}, r"lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            get_peft_model(llama(), BottleneckConfig(**wrong))
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), BottleneckConfig())
    with pytest.raises(ValueError, match="no linear layer in it"):
        get_peft_model(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), BottleneckConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="cannot be merged"):
        get_peft_model(llama(), BottleneckConfig()).merge_and_unload()
