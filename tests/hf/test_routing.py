"""Routing statistics: shares that sum to one, entropies that mean what they say, padding left out."""

from __future__ import annotations

import math

import pytest
import torch

from hf.mixing import folders, stir
from hf.tiny import IDS, llama
from veneer import LoraConfig, LoraMoeConfig, MixLoraConfig, MolaConfig, get_peft_model, mix
from veneer.hf.routing import heat_map, routing

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
TRAINED = {
    "mola": MolaConfig(experts=3, top_k=1, target_modules=["q_proj"]),
    "mixlora": MixLoraConfig(experts=3, top_k=1, target_modules=["mlp"]),
    "loramoe": LoraMoeConfig(experts=3, target_modules=["up_proj"]),
}


@pytest.mark.parametrize("method", [*TRAINED, "mole", "arrow", "xlora"])
def test_every_mixture_says_how_it_routed(method: str, tmp_path) -> None:
    if method in TRAINED:
        model = stir(get_peft_model(llama(), TRAINED[method]), 1)
    else:
        options = {"arrow": {"top_k": 1}, "xlora": {"layerwise_scalings": True}}.get(method, {})
        model = stir(mix(llama(), folders(tmp_path), method, **options), 1)
    model.eval()
    before = model(input_ids=IDS, attention_mask=MASK).logits
    uses = routing(model, {"input_ids": IDS, "attention_mask": MASK})
    assert len(uses) == (4 if method in ("mole", "arrow", "xlora") else 2)
    for use in uses:
        assert math.isclose(sum(use.load), 1, rel_tol=1e-5) and len(use.load) == 3
        assert -1e-6 <= use.entropy <= math.log(3) + 1e-6
        if method in ("mola", "mixlora", "arrow"):
            assert use.entropy == 0  # one expert a token
    other = IDS.clone()
    other[1, 3:] = 7
    again = routing(model, {"input_ids": other, "attention_mask": MASK})
    assert all(
        math.isclose(a, b, abs_tol=1e-5) for u, v in zip(uses, again, strict=True) for a, b in zip(u.load, v.load)
    )
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, before)
    assert model.base_model.penalty() is None
    assert len(heat_map(uses).splitlines()) == len(uses)


def test_even_gates_have_the_largest_entropy(tmp_path) -> None:
    model = mix(llama(), folders(tmp_path), "mole").eval()
    for use in routing(model, {"input_ids": IDS}):
        assert math.isclose(use.entropy, math.log(3), rel_tol=1e-5)
        assert all(math.isclose(share, 1 / 3, rel_tol=1e-5) for share in use.load)


def test_what_routes_nothing_is_refused() -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LORA, which routes nothing"):
        routing(model, {"input_ids": IDS})
