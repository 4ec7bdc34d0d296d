"""Spectra of what was learnt, and targets by condition number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parity import needs_peer
from veneer import LoraConfig, get_peft_model
from veneer.hf import spectrum
from veneer.hf.kappa import KappaTuneSelector, find_kappa_target_modules


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 6, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.emb, self.conv, self.experts = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3), Experts()


def trained(**options):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["a", "c", "emb", "conv"]} | options
    model = get_peft_model(Net(), LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"a": 2}, "alpha_pattern": {"c": 3}},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"init_lora_weights": "orthogonal"},
    ],
)
def test_a_folder_tells_what_the_live_adapter_holds(options, tmp_path):
    model = trained(**options)
    model.save_pretrained(tmp_path)
    live, saved = spectrum.of_model(model), spectrum.of_folder(tmp_path)
    found = {s.path: s for s in saved}
    assert found.keys() == {s.path for s in live}
    for one in live:
        assert torch.allclose(found[one.path].values, one.values[: one.rank], rtol=1e-4, atol=1e-6)
        assert found[one.path].rank == one.rank


def test_ranks_follow_from_the_values():
    flat = spectrum.Spectrum("x", 4, torch.ones(4))
    spiked = spectrum.Spectrum("y", 4, torch.tensor([1.0, 1e-4, 0, 0]))
    nothing = spectrum.Spectrum("z", 4, torch.zeros(4))
    assert flat.effective_rank == pytest.approx(4) and spiked.effective_rank == pytest.approx(1, abs=0.01)
    assert nothing.effective_rank == 0 and nothing.needed(0.9) == 1 and flat.norm == 2
    assert spectrum.suggested_ranks([flat, spiked, nothing], 0.7) == {"x": 3, "y": 1, "z": 1}
    assert spectrum.suggested_ranks([flat], 1.0) == {"x": 4}
    with pytest.raises(ValueError, match="energy must lie"):
        spectrum.suggested_ranks([flat], 0.0)


def test_the_suggestion_can_be_trained_with_and_drawn(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    spectra = spectrum.of_folder(tmp_path)
    pattern = spectrum.suggested_ranks(spectra, 0.5)
    again = get_peft_model(Net(), LoraConfig(r=4, target_modules=["a", "c", "emb", "conv"], rank_pattern=pattern))
    assert {path: lora.r for path, lora in again.base_model.adapters("default")} == pattern
    assert [row["layer"] for row in spectrum.rows(spectra)] == [s.path for s in spectra]
    pytest.importorskip("matplotlib")
    spectrum.draw(spectra, tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 1000


def test_a_delta_that_needs_the_base_is_not_guessed(tmp_path):
    trained(use_dora=True, target_modules=["a"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs the base model"):
        spectrum.of_folder(tmp_path)


@needs_peer
@pytest.mark.parametrize("top_p", [0.2, 0.5, 1.0])
def test_the_targets_of_small_condition_number_are_the_peers(top_p):
    import peft

    own = find_kappa_target_modules(Net(), top_p, show_progress=False)
    assert own == peft.find_kappa_target_modules(Net(), top_p=top_p, show_progress=False)


def test_a_selector_takes_a_number_or_a_threshold():
    chosen = KappaTuneSelector(Net(), show_progress=False)
    s = torch.linalg.svdvals(Net().b.weight)
    assert chosen.modules["b"] == pytest.approx(float((s[0] / s[-1]).detach()), rel=1e-4)
    assert chosen.get_best_targets(num_modules=1) == chosen.get_best_targets(threshold=min(chosen.modules.values()))
    with pytest.raises(ValueError, match="not several"):
        chosen.get_best_targets(top_p=0.5, num_modules=2)
