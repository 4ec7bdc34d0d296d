"""AdapterFusion: one adapter alone is itself, order does not matter, only the mixing learns, files are whole."""

from __future__ import annotations

import pytest
import torch

from hf.tiny import llama
from parity import randomise
from veneer import BottleneckConfig, FusionConfig, LoraConfig, PeftModel, get_peft_model

IDS = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 11, 12]])


def trained(folder, seed, **kwargs):
    model = get_peft_model(llama(), BottleneckConfig(reduction_factor=4, task_type="CAUSAL_LM", **kwargs)).eval()
    randomise([p for p in model.parameters() if p.requires_grad], seed=seed, size=0.3)
    model.save_pretrained(folder)
    return str(folder), model(IDS).logits.detach()


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_one_adapter_is_itself_and_equals_cannot_be_told_apart(placement, tmp_path):
    folder, expected = trained(tmp_path / "a", 1, placement=placement)
    for folders in ([folder], [folder, folder]):
        model = get_peft_model(llama(), FusionConfig(adapters=folders, task_type="CAUSAL_LM")).eval()
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


def test_only_the_mixing_learns_and_the_file_is_whole(tmp_path):
    folders = [trained(tmp_path / n, i)[0] for i, n in enumerate("ab")]
    model = get_peft_model(llama(), FusionConfig(adapters=folders, temperature_steps=10, task_type="CAUSAL_LM")).eval()
    own = model.base_model.hosts()[0].adapters["default"]
    assert float(own.temperature) == 50
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(".fusion_" in n for n in names)
    before = float(model.base_model.penalty().detach())
    randomise([p for p in model.parameters() if p.requires_grad])
    assert model.base_model.penalty() > before
    (model(IDS, labels=IDS).loss + model.base_model.penalty()).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    model.base_model.after_step(5)
    assert float(own.temperature) == pytest.approx(25.5)
    model.save_pretrained(tmp_path / "fused")
    for name in "ab":
        (tmp_path / name / "adapter_model.safetensors").unlink()
    again = PeftModel.from_pretrained(llama(), tmp_path / "fused")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_order_of_adapters_does_not_matter(tmp_path):
    folders = [trained(tmp_path / n, i)[0] for i, n in enumerate("ab")]
    answers = []
    for order in (folders, folders[::-1]):
        torch.manual_seed(0)
        config = FusionConfig(adapters=order, task_type="CAUSAL_LM")
        model = get_peft_model(llama(), config).eval()
        mixing = [p for n, p in model.named_parameters() if ".fusion_" in n]
        for i, p in enumerate(mixing):
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
        answers.append(model(IDS).logits)
    assert torch.allclose(*answers, atol=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="needs adapters"):
        get_peft_model(llama(), FusionConfig())
    get_peft_model(llama(), LoraConfig(r=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mixes plain bottlenecks"):
        get_peft_model(llama(), FusionConfig(adapters=[str(tmp_path)]))
    beside = trained(tmp_path / "p", 1, placement="parallel")[0]
    after = trained(tmp_path / "s", 1)[0]
    with pytest.raises(ValueError, match="cannot mix adapters"):
        get_peft_model(llama(), FusionConfig(adapters=[beside, after]))
    with pytest.raises(ValueError, match="no bottleneck at"):
        get_peft_model(llama(), FusionConfig(adapters=[after], target_modules=["self_attn"]))
