"""Poly, MHR and Lily: the peer's answers, tasks by row, routing that batch mates do not touch."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import veneer
from veneer import LilyConfig, LoraConfig, PolyConfig, get_peft_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = torch.tanh(layer["q"](x))
        return x


def stirred(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


TARGETS = {"target_modules": ["q"]}


@pytest.mark.parametrize("splits", [1, 2])
def test_poly_answers_as_the_peer_both_ways(tmp_path, splits: int) -> None:
    options = {"r": 4, "n_tasks": 3, "n_skills": 2, "n_splits": splits} | TARGETS
    x, tasks = torch.randn(3, 5, 8), torch.tensor([2, 0, 1])
    theirs = stirred(peft.get_peft_model(Net(), peft.PolyConfig(**options)))
    expected = theirs.base_model(x, task_ids=tasks)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(Net(), tmp_path / "theirs")
    assert torch.allclose(ours(x, task_ids=tasks), expected, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert torch.allclose(again.base_model(x, task_ids=tasks), expected, atol=1e-5)
    with pytest.raises(ValueError, match="task_ids"):
        ours(x)
    with pytest.raises(ValueError, match="tasks cannot be merged"):
        ours.merge_and_unload()
    for row in range(3):
        assert torch.allclose(ours(x[row : row + 1], task_ids=tasks[row : row + 1]), expected[row : row + 1], atol=1e-5)


def test_one_skill_of_one_task_is_lora() -> None:
    model = stirred(get_peft_model(Net(), PolyConfig(r=4, n_skills=1, **TARGETS)))
    plain = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=1, **TARGETS)).eval()
    with torch.no_grad():
        for (_, p), (_, lora) in zip(
            model.base_model.adapters("default"), plain.base_model.adapters("default"), strict=True
        ):
            lora.lora_A.weight.copy_(p.poly_lora_A[0, 0].T)
            lora.lora_B.weight.copy_(p.poly_lora_B[0, 0].T)
    x = torch.randn(2, 8)
    y = model(x)
    assert torch.allclose(y, plain(x), atol=1e-6)
    assert torch.allclose(model.merge_and_unload()(x), y, atol=1e-5)


def test_poly_samples_in_training_and_trains_its_router() -> None:
    model = stirred(get_peft_model(Net(), PolyConfig(r=4, n_skills=3, **TARGETS))).train()
    x = torch.randn(2, 8)
    assert not torch.equal(model(x), model(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lily_answers_as_the_peer_both_ways(tmp_path) -> None:
    options = {"r": 4, "num_B": 3, "stride_A": 2} | TARGETS
    x = torch.randn(3, 5, 8)
    theirs = stirred(peft.get_peft_model(Net(), peft.LilyConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(Net(), tmp_path / "theirs")
    assert ours.peft_config["default"].router_scope == "batch"
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning):  # the peer does not know router_scope, and says so
        again = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    assert torch.allclose(again(x), theirs(x), atol=1e-5)


def test_lily_rows_do_not_depend_on_batch_mates_or_padding() -> None:
    model = stirred(get_peft_model(Net(), LilyConfig(r=4, **TARGETS)))
    x, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    mask[1, 3:] = 0
    y = model(x, attention_mask=mask)
    assert torch.allclose(model(x[:1], attention_mask=mask[:1]), y[:1], atol=1e-6)
    noisy = x.clone()
    noisy[1, 3:] += 10
    assert torch.allclose(model(noisy, attention_mask=mask)[1, :3], y[1, :3], atol=1e-5)
    shared = [a for _, a in model.base_model.adapters("default")]
    assert shared[0].lily_B is shared[2].lily_B and shared[0].lily_A is not shared[1].lily_A


def test_a_file_whose_layers_disagree_on_a_shared_tensor_is_refused(tmp_path) -> None:
    model = stirred(get_peft_model(Net(), LilyConfig(r=4, **TARGETS)))
    tensors = {k: v.clone() for k, v in veneer.get_peft_model_state_dict(model).items()}
    y = model(x := torch.randn(2, 5, 8))
    tensors["base_model.model.layers.1.q.lily_B.weight"] += 1
    with pytest.raises(ValueError, match="different values"):
        veneer.set_peft_model_state_dict(model, tensors)
    assert torch.equal(model(x), y)
