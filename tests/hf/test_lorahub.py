"""LoRAHub: factors summed with constant weights, found without gradients, left as a plain LoRA."""

from __future__ import annotations

import sys

import pytest
import torch

from hf.mixing import deltas, folders
from hf.tiny import IDS, llama
from veneer import PeftModel, mix
from veneer.engine import checkpoint
from veneer.hf.lorahub import combined


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    return folders(tmp_path_factory.mktemp("experts"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_weights_act_on_the_factors(experts, tmp_path) -> None:
    each = [checkpoint.read(folder) for folder in experts.values()]
    for weights, times, which in (([0.0, 1.0, 0.0], 1, "b"), ([2.0, 0.0, 0.0], 4, "a")):
        checkpoint.write(tmp_path, combined(each, weights))
        found, wanted = deltas(str(tmp_path)), deltas(experts[which])
        assert all(torch.allclose(found[p], times * wanted[p], atol=1e-6) for p in wanted)


def test_the_search_comes_near_a_mixture_that_made_the_data(experts, tmp_path) -> None:
    pytest.importorskip("cma")
    each = [checkpoint.read(folder) for folder in experts.values()]
    made = PeftModel.from_pretrained(llama(), experts["a"])
    checkpoint.put(made.base_model, "default", combined(each, [0.9, 0.0, -0.6]))
    target, calls = logits(made), []

    def loss(model) -> float:
        calls.append(1)
        assert not torch.is_grad_enabled()
        return float((logits(model) - target).square().mean())

    start = loss_of_base = float((logits(llama()) - target).square().mean())
    calls.clear()
    found = mix(llama(), experts, "lorahub", loss=loss, steps=150, regularisation=0.0)
    assert len(calls) == 150
    assert float((logits(found) - target).square().mean()) < 0.2 * start
    weights = found.peft_config["default"].lorahub_weights
    assert list(weights) == list(experts) and all(abs(w) <= 1.5 for w in weights.values())
    found.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(found))
    assert torch.allclose(logits(again.merge_and_unload()), logits(found), atol=1e-5)
    repeated = mix(llama(), experts, "lorahub", loss=loss, steps=150, regularisation=0.0)
    assert torch.equal(logits(repeated), logits(found)) and loss_of_base == start


def test_a_strong_regulariser_leaves_the_base(experts) -> None:
    pytest.importorskip("cma")
    found = mix(llama(), experts, "lorahub", loss=lambda model: 0.0, steps=20, regularisation=1.0)
    assert torch.allclose(logits(found), logits(llama()), atol=1e-6)


def test_what_cannot_be_searched_is_refused(experts, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cma", None)
        with pytest.raises(ImportError, match="pip install cma"):
            mix(llama(), experts, "lorahub", loss=lambda model: 0.0)
    pytest.importorskip("cma")
    wide = folders(tmp_path / "wide", ("w",), r=4, lora_alpha=8)
    loud = folders(tmp_path / "loud", ("l",), lora_alpha=8)
    for other, words in ((wide, "other layers or ranks"), (loud, "differ in lora_alpha")):
        with pytest.raises(ValueError, match=words):
            mix(llama(), experts | other, "lorahub", loss=lambda model: 0.0)
    base = llama()
    with pytest.raises(ValueError, match="not finite"):
        mix(base, experts, "lorahub", loss=lambda model: float("nan"), steps=10)
    assert not any("adapters" in n for n, _ in base.named_modules())
