"""Compacter: its Kronecker sums and the rule that all places share."""

from __future__ import annotations

import pytest
import torch

from hf.tiny import llama
from parity import randomise
from veneer import CompacterConfig, PeftModel, get_peft_model
from veneer.engine import checkpoint
from veneer.methods.compacter import phm

IDS = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 11, 12]])


def test_a_matrix_is_a_sum_of_kronecker_products():
    A, s, t = torch.randn(4, 4, 4), torch.randn(4, 3, 1), torch.randn(4, 1, 5)
    expected = sum(torch.kron(A[i], s[i] @ t[i]) for i in range(4))
    assert torch.allclose(phm(A, s, t), expected, atol=1e-5)
    one = phm(torch.ones(1, 1, 1), s[:1], t[:1])
    assert torch.allclose(one, s[0] @ t[0]) and torch.linalg.matrix_rank(one) == 1


def test_one_rule_serves_all_places_and_is_saved_once(tmp_path):
    model = get_peft_model(llama(), CompacterConfig(reduction_factor=4, task_type="CAUSAL_LM")).eval()
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    randomise([p for p in model.parameters() if p.requires_grad])
    tensors = checkpoint.tensors(model.base_model, "default")
    assert [k for k in tensors if "rule" in k] == ["base_model.phm_rule"]
    assert sum(k.endswith("phm_up_s") for k in tensors) == 4
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path)(IDS).logits, model(IDS).logits)


def test_refusals():
    with pytest.raises(ValueError, match=r"phm_dim=3 does not divide the width of 'model.layers.0"):
        get_peft_model(llama(), CompacterConfig(phm_dim=3))
    with pytest.raises(ValueError, match="phm_dim must be"):
        get_peft_model(llama(), CompacterConfig(phm_dim=0))
    with pytest.raises(ValueError, match="no learned scaling"):
        get_peft_model(llama(), CompacterConfig(scaling="learned"))
