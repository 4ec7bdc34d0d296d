"""What the scaling, reweighting and small additive methods promise: the papers' formulas, starts, and known traps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws.kinds import Chain
from methods.test_rotation import at, double, one, same_gradients
from parity import near, ours, read, write
from veneer import (
    BeftConfig,
    BitFitConfig,
    DeftConfig,
    DeloraConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    IA3Config,
    MissConfig,
    PeftConfig,
)
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner


def fresh(layer: nn.Module, config: Any) -> Tuner:
    tuner = Tuner(Chain(None, layer))
    tuner.add("default", config)
    tuner.set_active("default")
    return tuner


# ---- (IA)^3, biases, norms ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_is_its_formula(on_input: bool) -> None:
    layer, x = double()
    tuner = ours(Chain(None, layer), at(IA3Config, feedforward_modules=["layer"] if on_input else []))
    l = one(tuner).ia3_l.flatten()
    expected = layer.weight @ (x * l).unsqueeze(-1) if on_input else (layer.weight @ x.unsqueeze(-1))
    expected = expected.squeeze(-1) + layer.bias
    same_gradients(tuner, x, tuner(x), expected if on_input else expected * l)


def test_two_ia3_adapters_multiply_and_a_zero_factor_comes_back_whole() -> None:
    layer, x = double()
    w, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    tuner = Tuner(Chain(None, layer))
    for name, value in (("first", 2.0), ("second", -0.5)):
        tuner.add(name, at(IA3Config, feedforward_modules=[]))
        nn.init.constant_(next(tuner.adapters(name))[1].ia3_l, value)
    tuner.set_active("first", "second")
    assert torch.allclose(tuner(x), -nn.functional.linear(x, w, b))
    nn.init.zeros_(next(tuner.adapters("first"))[1].ia3_l)
    tuner.merge()
    assert tuner(x).abs().max() == 0
    tuner.unmerge()
    assert torch.equal(layer.weight, w) and torch.equal(layer.bias, b)


def test_ia3_refuses_feedforward_modules_outside_its_targets() -> None:
    with pytest.raises(ValueError, match="subset"):
        IA3Config(target_modules=["k"], feedforward_modules=["fc"])


@pytest.mark.parametrize("layer", [nn.Linear(8, 6, bias=False), nn.Conv2d(8, 6, 1, bias=False), nn.Embedding(8, 6)])
def test_beft_merges_where_there_is_no_bias(layer: nn.Module) -> None:
    x = {nn.Linear: torch.randn(2, 8), nn.Conv2d: torch.randn(2, 8, 3, 3)}.get(type(layer), torch.arange(8))
    tuner = ours(Chain(None, layer), at(BeftConfig))
    y = tuner(x)
    merged = tuner.unload(merge=True)
    assert near(merged(x), y, 1e-6)


def test_bitfit_trains_existing_biases_and_nothing_else() -> None:
    model = Chain(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False))
    with pytest.raises(ValueError, match="BEFT"):
        Tuner(model).add("default", BitFitConfig())
    tuner = fresh(nn.Linear(8, 4), BitFitConfig())
    assert [tuple(p.shape) for p in tuner.parameters() if p.requires_grad] == [(4,)]
    tuner = Tuner(model)
    tuner.add("default", BitFitConfig(target_modules=["first", "layer"]))
    tuner.set_active("default")
    assert [tuple(p.shape) for p in tuner.parameters() if p.requires_grad] == [(8,), (8,)]
    assert set(checkpoint.tensors(tuner, "default")) == {"base_model.model.first.bias", "base_model.model.layer.bias"}


# ---- methods that read the weight -----------------------------------------------------------------------------------
def test_hira_is_its_formula_and_may_have_full_rank() -> None:
    layer, x = double()
    w = layer.weight.detach().clone()
    tuner = ours(Chain(None, layer), at(HiraConfig, r=2))
    a, b = one(tuner).hira_A, one(tuner).hira_B
    same_gradients(tuner, x, tuner(x), x @ (w * (1 + b @ a)).T + layer.bias)
    tuner.merge()
    assert torch.linalg.matrix_rank(layer.weight - w) > 2


def test_hira_with_dropout_is_the_same_in_eval_mode() -> None:
    layer, x = double()
    plain = ours(Chain(None, layer), at(HiraConfig, r=2))
    dropped = ours(Chain(None, layer), at(HiraConfig, r=2, hira_dropout=0.5))
    checkpoint.put(dropped, "default", checkpoint.tensors(plain, "default"))
    assert torch.allclose(dropped(x), plain(x), atol=1e-12)
    dropped.train()
    assert not torch.allclose(dropped(x), plain(x), atol=1e-3)


def test_glora_is_its_formula() -> None:
    layer, x = double()
    w, bias = layer.weight, layer.bias
    tuner = ours(Chain(None, layer), at(GloraConfig, r=3))
    g = {name: one(tuner)._modules[f"glora_{name}"] for name in "ABCDE"}
    a, b, c = (g[n]["Xd"] @ g[n]["Xu"] for n in "ABC")
    new_bias = bias + bias * g["D"]["X"] + g["E"]["X"] + (w @ c).flatten()
    same_gradients(tuner, x, tuner(x), x @ (w + w * a + b).T + new_bias)


@pytest.mark.parametrize(("how", "alpha", "para"), [("relu", None, False), ("qr", 6, False), ("qr", None, True)])
def test_deft_is_its_formula(how: str, alpha: int | None, para: bool) -> None:
    layer, x = double()
    w = layer.weight.detach()
    tuner = ours(Chain(None, layer), at(DeftConfig, r=3, decomposition_method=how, alpha=alpha, para=para))
    p, s = one(tuner).deft_P, 1 if alpha is None else alpha / 3
    p = torch.linalg.qr(p)[0] if how == "qr" else p
    new = (torch.eye(8) - p @ (p if how == "qr" else p.relu()).T) @ w
    if not para:
        new = new + s * p @ one(tuner).deft_R
    same_gradients(tuner, x, tuner(x), x @ new.T + layer.bias)


def test_para_takes_rank_out() -> None:
    layer, _ = double(8, 8)
    tuner = fresh(layer, at(DeftConfig, r=3, decomposition_method="qr", para=True))
    tuner.merge()
    assert torch.linalg.matrix_rank(layer.weight, atol=1e-6) == 5


# ---- additive -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("r", [4, 5])
def test_miss_is_its_formula_also_where_r_does_not_divide_the_width(r: int) -> None:
    layer, x = double()
    tuner = ours(Chain(None, layer), at(MissConfig, r=r))
    d, change = one(tuner).miss_block, 0
    for start in range(0, 12, r):
        chunk = x[..., start : start + r]
        change = change + chunk @ d[: chunk.shape[-1]]
    same_gradients(tuner, x, tuner(x), x @ layer.weight.T + layer.bias + change)


def test_miss_bat_is_its_formula() -> None:
    layer, x = double()
    tuner = ours(Chain(None, layer), at(MissConfig, r=4, init_weights="bat"))
    d = one(tuner).miss_block
    rows = [torch.cat([w @ d[i] + d[i] for w in band.split(4, 1)], 1) for i, band in enumerate(layer.weight.split(4))]
    same_gradients(tuner, x, tuner(x), x @ (layer.weight + torch.cat(rows)).T + layer.bias)


@pytest.mark.parametrize("how", [True, "bat"])
def test_a_folder_from_when_miss_was_bone_is_read_and_written_as_miss(how: bool | str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 8)
    tuner, x = ours(Chain(None, base), at(MissConfig, r=4, init_weights=how)), torch.randn(3, 8)
    tensors = {k.replace("miss_", "bone_"): v for k, v in checkpoint.tensors(tuner, "default").items()}
    checkpoint.write(tmp_path, tensors)
    config = {"peft_type": "BONE", "r": 4, "init_weights": how, "target_modules": ["layer"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    again = read(Chain(None, base), tmp_path)
    assert near(again(x), tuner(x), 1e-6)
    write(again, tmp_path / "new")
    assert PeftConfig.read(tmp_path / "new").peft_type == "MISS"
    assert all("miss_block" in k for k in checkpoint.read(tmp_path / "new"))


def test_delora_is_its_formula() -> None:
    layer, x = double()
    w = layer.weight.detach()
    tuner = ours(Chain(None, layer), at(DeloraConfig, r=3, delora_lambda=4), size=0.5)
    a, b, strength = one(tuner).delora_A, one(tuner).delora_B, one(tuner).delora_lambda
    change = sum(torch.outer(b[:, i], a[i]) / (a[i].norm() * b[:, i].norm()) for i in range(3)) * strength / 3
    n = w.norm(dim=0)
    same_gradients(tuner, x, tuner(x), x @ (w + change * n).T + layer.bias)
    tuner.merge()
    bound = strength * n.max()
    assert (layer.weight - w).norm() <= bound


def test_deloras_first_gradient_is_of_an_ordinary_size() -> None:
    """The norms' floor multiplies it by 1e4 in the peer, so clipping by the global norm starves all else."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 32), torch.randn(16, 32)
    tuner = fresh(layer, at(DeloraConfig, r=8))
    tuner(x).square().mean().backward()
    first = one(tuner).delora_B.grad.norm()
    w = (layer.weight.detach() + torch.zeros(32, 32)).requires_grad_()
    nn.functional.linear(x, w, layer.bias).square().mean().backward()
    assert 0 < first < 15 / 8 * 8 * w.grad.norm(), "no more than lambda times the full gradient"
    with torch.no_grad():
        one(tuner).delora_B.add_(1e-9)
    assert near(tuner(x), nn.functional.linear(x, layer.weight, layer.bias), 0.1), "the function keeps its floor"


@pytest.mark.parametrize("hybrid", [0, 2])
def test_gralora_is_its_formula(hybrid: int) -> None:
    layer, x = double()
    tuner = ours(Chain(None, layer), at(GraloraConfig, r=4, gralora_k=2, alpha=8, hybrid_r=hybrid))
    adapter = one(tuner)
    a, b, change = adapter.gralora_A, adapter.gralora_B, []
    for i in range(2):
        row = [b[i, 2 * j : 2 * j + 2].T @ a[j, :, 2 * i : 2 * i + 2].T for j in range(2)]
        change.append(torch.cat(row, 1))
    change = torch.cat(change)
    if hybrid:
        change = change + adapter.gralora_B_general["weight"] @ adapter.gralora_A_general["weight"]
    same_gradients(tuner, x, tuner(x), x @ (layer.weight + 8 / (4 + hybrid) * change).T + layer.bias)


# ---- refusals and counts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("config", "count"), [
    (at(IA3Config, feedforward_modules=[]), 8), (at(BeftConfig), 8), (at(HiraConfig, r=2), 2 * 20),
    (at(DeftConfig, r=2), 2 * 20), (at(MissConfig, r=4), 4 * 8), (at(MissConfig, r=4, init_weights="bat"), 4 * 8),
    (at(MissConfig, r=4, mini_r=2, init_weights="mini"), 4 * 2), (at(DeloraConfig, r=2), 2 * 20 + 1),
    (at(GraloraConfig, r=4), 4 * 20), (at(GloraConfig, r=2), 2 * (2 * 20) + 2 * 13 + 2),
], ids=lambda v: type(v).__name__ if not isinstance(v, int) else str(v))  # fmt: skip
def test_trainable_numbers_are_as_many_as_the_paper_says(config: Any, count: int) -> None:
    tuner = fresh(nn.Linear(12, 8), config)
    assert sum(p.numel() for p in tuner.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(("config", "says"), [
    (at(MissConfig, r=64), "lower r"), (at(MissConfig, r=3, init_weights="bat"), "divide both"),
    (at(MissConfig, r=4, mini_r=3, init_weights="mini"), "does not divide"),
    (at(GraloraConfig, r=5, gralora_k=5), "parts"),
    (at(DeftConfig, r=9, decomposition_method="qr"), "lower r"), (at(HiraConfig, r=0), "positive"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence(config: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fresh(nn.Linear(12, 8), config)


def test_dropout_of_an_input_that_cannot_be_reached_is_refused() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table.T

    for config in (
        MissConfig(r=2, miss_dropout=0.1),
        HiraConfig(r=2, hira_dropout=0.1),
        DeloraConfig(module_dropout=0.1),
    ):
        config.target_parameters = ["table"]
        with pytest.raises(ValueError, match="only the weight can be reached"):
            Tuner(Chain(None, Holder())).add("default", config)
