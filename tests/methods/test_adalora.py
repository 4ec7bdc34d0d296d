"""AdaLoRA: formula, regulariser, scores, the published budget, pruning like the peer's, sliced files, bad settings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from laws.kinds import Chain, Experts
from methods.test_lora import base_of, inputs_of
from parity import both_ways, call, near, needs_peer, ours, peer, read, read_by_peer, write
from veneer import AdaLoraConfig
from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner

SETTINGS = {"init_r": 6, "target_r": 2, "total_step": 40, "target_modules": ["first", "layer"]}
SCHEDULE = {"tinit": 5, "tfinal": 10}


def config(**settings) -> AdaLoraConfig:
    return AdaLoraConfig(**(SETTINGS | settings))


def pair() -> nn.Module:
    torch.manual_seed(0)
    return Chain(nn.Linear(8, 8), nn.Linear(8, 16)).eval()


def test_forward_and_regulariser_are_the_papers() -> None:
    torch.manual_seed(0)
    base = Chain(None, nn.Linear(7, 5)).double()
    tuner = ours(base, config(target_modules=["layer"], init_r=3, lora_alpha=6))
    adapter = next(iter(tuner.adapters("default")))[1]
    p, e, q = adapter.lora_B, adapter.lora_E, adapter.lora_A
    x = torch.randn(4, 7, dtype=torch.float64)
    weight = base.layer.base_layer.weight + 6 / (3 + 1e-5) * p @ torch.diag(e[:, 0]) @ q
    assert torch.allclose(tuner(x), x @ weight.T + base.layer.base_layer.bias, atol=1e-12)
    one = torch.eye(3, dtype=torch.float64)
    expected = 0.5 * ((p.T @ p - one).square().sum().sqrt() + (q @ q.T - one).square().sum().sqrt()) / 2
    assert torch.allclose(tuner.penalty().double(), expected, atol=1e-5)


def test_regulariser_is_nothing_for_orthonormal_factors_and_a_mean_over_layers() -> None:
    tuner = ours(pair(), config(init_r=4, orth_reg_weight=1.0))
    for _, adapter in tuner.adapters("default"):
        nn.init.orthogonal_(adapter.lora_A)
        nn.init.orthogonal_(adapter.lora_B)
    assert tuner.penalty().item() < 1e-5
    with torch.no_grad():
        next(iter(tuner.adapters("default")))[1].lora_A.zero_()
    assert abs(tuner.penalty().item() - 4**0.5 / 4) < 1e-5  # ||I_4|| over the four factors of two layers


def test_the_published_budget() -> None:
    one = config(tinit=5, tfinal=10)
    budgets = [one.budget(t, 2) for t in range(41)]
    assert budgets[:6] == [12] * 6
    assert budgets[6:20] == [11, 10, 9, 8, 8, 7, 6, 6, 6, 5, 5, 5, 4, 4]
    assert budgets[20:] == [4] * 21


def test_phases_left_at_zero_give_learning_a_beginning_and_an_end() -> None:
    assert config(total_step=1000).phases == (100, 700)
    assert config(total_step=1000, tinit=0, tfinal=1).phases == (0, 999)


def test_scores_of_gradients_made_by_hand() -> None:
    tuner = ours(
        Chain(None, nn.Linear(2, 1)), config(target_modules=["layer"], init_r=2, target_r=1, beta1=0.5, beta2=0.8)
    )
    adapter = next(iter(tuner.adapters("default")))[1]
    with torch.no_grad():
        adapter.lora_A.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        adapter.lora_E.copy_(torch.tensor([[1.0], [2.0]]))
        adapter.lora_B.copy_(torch.tensor([[5.0, 6.0]]))
    for p in (adapter.lora_A, adapter.lora_E, adapter.lora_B):
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with torch.no_grad():
            adapter._watch(0.5, 0.8)

    def score(w: float) -> float:  # I = w: smooth 0.5 w, 0.75 w; uncertain 0.2 (0.5 w), 0.8 (0.1 w) + 0.2 (0.25 w)
        return 0.75 * w * (0.08 * w + 0.05 * w)

    expected = [score(1) + (score(1) + score(2)) / 2 + score(5), score(2) + (score(3) + score(4)) / 2 + score(6)]
    assert torch.allclose(adapter.scores(), torch.tensor(expected), rtol=1e-5)


def train(model: nn.Module, allocate, steps: int = 40) -> list[int]:
    """Train on a fixed stream; returns the number of live triplets after each step."""
    torch.manual_seed(1)
    data = [(torch.randn(16, 8), torch.randn(16, 16)) for _ in range(steps)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    alive = []
    for step, (x, y) in enumerate(data, 1):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        allocate(step)
        alive.append(sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n))
    return alive


def test_live_triplets_follow_the_budget_and_stay_settled() -> None:
    one = config(tinit=5, tfinal=10)
    tuner = ours(pair(), one).train()
    alive = train(tuner, tuner.after_step)
    assert alive == [one.budget(t, 2) for t in range(1, 41)]
    assert sum(sum(mask) for mask in one.rank_pattern.values()) == 4
    assert set(one.rank_pattern) == {"first.lora_E", "layer.lora_E"}


@needs_peer
def test_prunes_what_the_peer_prunes(tmp_path) -> None:
    import peft

    theirs = peer(pair(), peft.AdaLoraConfig(**(SETTINGS | SCHEDULE)))
    theirs.save_pretrained(tmp_path)
    mine = read(pair(), tmp_path).train()
    assert train(mine, mine.after_step) == train(theirs.train(), theirs.base_model.update_and_allocate)
    x = torch.randn(5, 8)
    assert near(mine.eval()(x), call(theirs.eval(), x), 1e-4)
    pattern = {k.removesuffix(".default"): v for k, v in theirs.peft_config["default"].rank_pattern.items()}
    assert mine.configs["default"].rank_pattern == pattern


@needs_peer
def test_a_pruned_adapter_is_sliced_in_its_file_both_ways(tmp_path) -> None:
    import peft

    x = torch.randn(5, 8)
    mine = ours(pair(), AdaLoraConfig(**(SETTINGS | SCHEDULE))).train()
    train(mine, mine.after_step)
    expected = mine.eval()(x)
    write(mine, tmp_path / "mine")
    ranks = [v.shape[0] for k, v in checkpoint.read(tmp_path / "mine").items() if k.endswith("lora_E")]
    assert sum(ranks) == 4
    assert near(call(read_by_peer(pair(), tmp_path / "mine"), x), expected, 1e-5)
    again = read(pair(), tmp_path / "mine")
    assert near(again(x), expected, 1e-5)
    write(again, tmp_path / "again")
    assert checkpoint.read(tmp_path / "again").keys() == checkpoint.read(tmp_path / "mine").keys()
    assert PeftConfig.read(tmp_path / "again").rank_pattern == PeftConfig.read(tmp_path / "mine").rank_pattern

    theirs = peer(pair(), peft.AdaLoraConfig(**(SETTINGS | SCHEDULE))).train()
    train(theirs, theirs.base_model.update_and_allocate)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert near(read(pair(), tmp_path / "theirs")(x), call(theirs, x), 1e-5)


def test_training_goes_on_after_a_resume(tmp_path) -> None:
    one = config(tinit=5, tfinal=10)
    tuner = ours(pair(), one).train()
    train(tuner, tuner.after_step, steps=20)
    write(tuner, tmp_path)
    again = read(pair(), tmp_path).train()
    alive = train(again, lambda step: again.after_step(20 + step), steps=20)
    assert alive[-1] == 4 and again.configs["default"].rank_pattern


def test_experts_share_the_budget_and_slice_their_files(tmp_path) -> None:
    torch.manual_seed(0)
    base = Chain(nn.Linear(8, 8), Experts(), nn.Linear(8, 16))
    one = config(target_modules=["first"], target_parameters=["layer.down_proj"], tinit=5, tfinal=10)
    tuner = ours(copy.deepcopy(base), one).train()
    alive = train(tuner, tuner.after_step)
    assert alive[-1] == 4 * 2  # one linear layer and three experts
    write(tuner, tmp_path)
    x = torch.randn(5, 8)
    assert near(read(copy.deepcopy(base), tmp_path)(x), tuner.eval()(x), 1e-5)


def test_gradients_that_overflowed_do_not_spoil_the_scores() -> None:
    tuner = ours(pair(), config())
    adapter = next(iter(tuner.adapters("default")))[1]
    for p in adapter.parameters():
        p.grad = torch.full_like(p, float("nan"))
    tuner.after_step(1)
    assert torch.isfinite(adapter.scores()).all()


@needs_peer
@pytest.mark.parametrize("options", [{}, {"lora_alpha": 32}, {"lora_dropout": 0.2}, {"bias": "lora_only"}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "linear_no_bias", "conv1d_hf", "conv2d", "conv2d_1x1"])
def test_parity(kind: str, options: dict, tmp_path) -> None:
    import peft

    if (kind, "bias") == ("linear_no_bias", *options):
        options = {"bias": "all"}
    settings = {"init_r": 4, "target_r": 2, "total_step": 100, "target_modules": ["layer"]} | options
    both_ways(base_of(kind), peft.AdaLoraConfig(**settings), AdaLoraConfig(**settings), inputs_of(kind), tmp_path)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"total_step": None}, "needs total_step"),
        ({"tinit": 30, "tfinal": 10}, "leave no step"),
        ({"target_r": 12}, "above init_r"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings: dict, error: str) -> None:
    tuner = Tuner(pair())
    with pytest.raises(ValueError, match=error):
        tuner.add("a", config(**settings))
    assert not tuner.configs


@pytest.mark.parametrize("experts", [False, True])
def test_a_resumed_run_prunes_as_one_that_was_never_stopped(tmp_path, experts: bool) -> None:
    def fresh() -> tuple[Tuner, torch.optim.Optimizer]:
        torch.manual_seed(0)
        targets = {"target_modules": [], "target_parameters": ["layer.gate_up_proj"]} if experts else {}
        tuner = Tuner(Chain(nn.Linear(8, 8), Experts()) if experts else pair())
        tuner.add("a", config(tinit=5, tfinal=10, **targets))
        tuner.set_active("a")
        return tuner, torch.optim.AdamW([p for p in tuner.parameters() if p.requires_grad], lr=0.05)

    def train(tuner: Tuner, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            (tuner(x).square().mean() + tuner.penalty()).backward()
            optimizer.step()
            tuner.after_step(step + 1)
            optimizer.zero_grad()

    whole, optimizer = fresh()
    train(whole, optimizer, range(40))
    first, optimizer = fresh()
    train(first, optimizer, range(17))
    checkpoint.write(tmp_path, checkpoint.tensors(first, "a"))
    checkpoint.write_training_state(tmp_path, first)
    again, other = fresh()
    checkpoint.put(again, "a", checkpoint.read(tmp_path))
    other.load_state_dict(optimizer.state_dict())
    checkpoint.read_training_state(tmp_path, again)
    train(again, other, range(17, 40))
    assert again.configs["a"].rank_pattern == whole.configs["a"].rank_pattern
    for ours_now, never in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours_now, never)
