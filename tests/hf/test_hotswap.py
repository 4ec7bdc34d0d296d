"""Another adapter's weights into a running one's place: what comes out, what is compiled again, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from veneer.hf.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


class Layers(nn.Module):
    """One layer of each kind that can be swapped at."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)

    def forward(self, ids):
        x = torch.tanh(self.linear(self.table(ids)))
        return self.grouped(torch.tanh(self.conv(x.mT)))


ALL = ["table", "linear", "conv", "grouped"]
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def adapted(seed: int = 0, **options) -> PeftModel:
    torch.manual_seed(0)
    model = Layers()
    torch.manual_seed(seed + 1)
    settings = {"r": 4, "target_modules": ALL, "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**settings)).eval()


def saved(folder, seed: int, **options) -> tuple[str, torch.Tensor]:
    model = adapted(seed, **options)
    model.save_pretrained(folder)
    return str(folder), model(IDS).detach()


@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("prepared", [True, False])
def test_what_was_swapped_in_runs_and_is_what_is_saved(tmp_path, rank, prepared) -> None:
    other, expected = saved(tmp_path / "other", 1, r=rank, lora_alpha=3)
    model = adapted()
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = model(IDS)
    hotswap_adapter(model, other, "default")
    assert torch.allclose(model(IDS), expected, atol=1e-5) and not torch.allclose(before, expected, atol=1e-3)
    assert model.peft_config["default"].r == rank
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(adapted().unload(), tmp_path / "again")
    assert torch.allclose(again(IDS), expected, atol=1e-5)


def test_a_swap_compiles_nothing_anew(tmp_path) -> None:
    compiles = []

    def counting(graph, inputs):
        compiles.append(1)
        return graph.forward

    swaps = [
        saved(tmp_path / str(i), i, r=r, lora_alpha=alpha) for i, (r, alpha) in enumerate([(2, 5), (8, 3), (4, 9)])
    ]
    model = adapted(7)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    compiled(IDS)
    assert len(compiles) == 1
    for folder, expected in swaps:
        hotswap_adapter(compiled, folder, "default")
        assert torch.allclose(compiled(IDS), expected, atol=1e-5)
    assert len(compiles) == 1


def test_layers_that_the_new_one_lacks_fall_silent(tmp_path) -> None:
    folder, expected = saved(tmp_path, 1, target_modules=["linear"])
    model = adapted()
    hotswap_adapter(model, folder, "default")
    assert torch.allclose(model(IDS), expected, atol=1e-6)


def test_injected_models_and_live_names() -> None:
    """What diffusers does: its model keeps its class, and the tensors come under the names they have in it."""
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False), Layers())
    new = {k: torch.randn_like(v) for k, v in get_peft_model_state_dict(model).items()}
    live = {k.replace(".weight", ".default.weight"): v for k, v in new.items()}
    hotswap_adapter_from_state_dict(model, live, "default", LoraConfig(r=4, target_modules=["linear"]))
    assert all(torch.equal(v, new[k]) for k, v in get_peft_model_state_dict(model).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "for use_dora"),
        ({"use_rslora": True}, "for use_rslora"),
        ({"lora_dropout": 0.1}, "for lora_dropout"),
    ],
)
def test_what_does_not_agree_is_refused_and_nothing_changes(tmp_path, options, message) -> None:
    folder, _ = saved(tmp_path, 1, target_modules=["linear"], **options)
    model = adapted(target_modules=["linear"])
    before = get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, folder, "default")
    assert all(torch.equal(v, before[k]) for k, v in get_peft_model_state_dict(model).items())


def test_tensors_without_a_place_are_refused_and_nothing_changes(tmp_path) -> None:
    folder, _ = saved(tmp_path, 1)
    model = adapted(target_modules=["linear"])
    before, y = model.peft_config["default"], model(IDS)
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*conv"):
        hotswap_adapter(model, folder, "default")
    wrong = {"linear.lora_A.weight": torch.zeros(4, 9), "linear.lora_B.weight": torch.zeros(8, 4)}
    with pytest.raises(RuntimeError, match=r"size mismatch: linear\.lora_A\.weight"):
        hotswap_adapter_from_state_dict(model, wrong, "default", LoraConfig(r=4))
    assert torch.equal(model(IDS), y) and model.peft_config["default"] is before


def test_other_refusals(tmp_path) -> None:
    folder, _ = saved(tmp_path, 1)
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="currently merged"):
        hotswap_adapter(merged, folder, "default")
    with pytest.raises(ValueError, match="there is no adapter 'nope'"):
        hotswap_adapter(adapted(), folder, "nope")
    other = get_peft_model(Layers(), IA3Config(target_modules=["linear"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        hotswap_adapter(other, folder, "default")
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(Layers())
    with pytest.raises(ValueError, match=r"target rank 2, but the original rank is larger \(4\)"):
        prepare_model_for_compiled_hotswap(adapted(), target_rank=2)
    compiled = torch.compile(adapted(), backend="eager")
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")


def test_room_by_pattern() -> None:
    model = adapted(target_modules=["linear", "conv"])
    config = LoraConfig(r=4, rank_pattern={"conv": 16})
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=config)
    inner = model.get_base_model()
    assert inner.linear.lora_A["default"].weight.shape[0] == 6 and inner.conv.lora_A["default"].weight.shape[0] == 16
    assert isinstance(inner.linear.scaling["default"], torch.Tensor)
