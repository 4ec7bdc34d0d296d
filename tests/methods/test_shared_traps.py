"""Shared, spectral and sparse methods: what goes wrong elsewhere, and what a user relies on beyond the formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from laws.kinds import Chain, SelfAttention
from methods.test_shared_parity import deep, two
from parity import call, near, needs_peer, ours, peer, read, write
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner

UP_DOWN = {"target_modules": ["up", "down"]}


def x16() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(4, 16)


def adapters(tuner: Tuner) -> list[nn.Module]:
    return [adapter for _, adapter in tuner.adapters("default")]


def test_several_c3a_adapters_add_up() -> None:
    """The peer feeds the second adapter with the first one's output."""
    tuner, x = Tuner(two()), x16()
    base = call(tuner, x)
    layer = {"target_modules": ["down"], "block_size": 4, "init_weights": "gaussian"}
    for name in "ab":
        tuner.add(name, veneer.C3AConfig(**layer))
    parts = []
    for name in "ab":
        tuner.set_active(name)
        parts.append(call(tuner, x) - base)
    tuner.set_active("a", "b")
    assert near(call(tuner, x), base + parts[0] + parts[1], 1e-6)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (veneer.VeraConfig(r=4, **UP_DOWN), ("vera_A", "vera_B")),
        (veneer.PveraConfig(r=4, **UP_DOWN), ("pvera_A", "pvera_B")),
        (veneer.VBLoRAConfig(r=2, num_vectors=6, vector_length=4, **UP_DOWN), ("vblora_vector_bank",)),
        (veneer.UniLoraConfig(r=2, theta_d_length=20, **UP_DOWN), ("unilora_theta_d",)),
        (veneer.TinyLoraConfig(r=2, u=4, weight_tying=1.0, **UP_DOWN), ("tinylora_v.0",)),
        (veneer.FrodConfig(**UP_DOWN), ("frod_V.up", "frod_V.down")),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_layers_share_lives_once(config: veneer.PeftConfig, keys: tuple[str, ...]) -> None:
    tuner = ours(deep(), config)
    saved = checkpoint.tensors(tuner, "default")
    for key in keys:
        assert [k for k in saved if k.endswith(key)] == [f"base_model.{key}"]
        value = saved[f"base_model.{key}"]
        held = [t for t in [*tuner.parameters(), *tuner.buffers()] if t.shape == value.shape and torch.equal(t, value)]
        assert len(held) == 1


@pytest.mark.parametrize(
    "config",
    [
        veneer.VeraConfig(r=4, save_projection=False, **UP_DOWN),
        veneer.RandLoraConfig(r=4, save_projection=False, **UP_DOWN),
        veneer.TinyLoraConfig(r=2, u=4, save_projection=False, **UP_DOWN),
        veneer.UniLoraConfig(r=2, theta_d_length=20, **UP_DOWN),
        veneer.FourierFTConfig(n_frequency=9, **UP_DOWN),
        veneer.WaveFTConfig(n_frequency=9, init_weights=False, **UP_DOWN),
        veneer.SupertuningConfig(sparsity=0.8, save_precomputed_indices=False, **UP_DOWN),
        veneer.FrodConfig(sparse_rate=0.1, **UP_DOWN),
        veneer.OSFConfig(**UP_DOWN),
        veneer.AdamssConfig(r=6, num_subspaces=2, **UP_DOWN),
    ],
    ids=lambda c: type(c).__name__,
)
def test_what_no_file_holds_is_found_again_also_when_built_empty(config: veneer.PeftConfig, tmp_path: Path) -> None:
    model, x = veneer.PeftModel(two(), config), x16()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * p.requires_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    for low in (False, True):
        torch.manual_seed(99)
        again = veneer.PeftModel.from_pretrained(two(), tmp_path, low_cpu_mem_usage=low).eval()
        assert near(call(again, x), call(model.eval(), x), 1e-6)


def test_rank_dropout_is_out_of_the_merge() -> None:
    for config in (
        veneer.LoHaConfig(r=2, rank_dropout=0.5, **UP_DOWN),
        veneer.LoKrConfig(r=1, rank_dropout=0.5, **UP_DOWN),
    ):
        tuner, x = ours(two(), config), x16()
        y = call(tuner, x)
        tuner.train()
        assert not near(call(tuner, x), y, 1e-4)
        tuner.merge()
        assert near(call(tuner, x), y, 1e-5)


def test_lokr_never_builds_the_product_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.methods.lokr import LoKr

    def refuse(self: LoKr) -> torch.Tensor:
        raise AssertionError("the Kronecker product was built")

    cases = [
        (two, UP_DOWN["target_modules"], x16()),
        (lambda: Chain(None, nn.Conv2d(4, 8, 3, padding=1)), ["layer"], torch.randn(2, 4, 5, 5)),
        (lambda: Chain(None, nn.Embedding(20, 8)), ["layer"], torch.randint(0, 20, (3, 4))),
    ]
    for base, targets, x in cases:
        tuner = ours(base(), veneer.LoKrConfig(r=1, target_modules=targets))
        dense = tuner.hosts()[0].adapters["default"].delta_weight()
        with monkeypatch.context() as patch:
            patch.setattr(LoKr, "delta_weight", refuse)
            y = call(tuner, x)
        tuner.merge()
        assert dense.shape and near(call(tuner, x), y, 1e-5)


def test_pvera_draws_in_training_and_holds_the_mean_in_eval() -> None:
    tuner, x = ours(two(), veneer.PveraConfig(r=4, kl_weight=0.5, **UP_DOWN), size=0.5), x16()
    assert torch.equal(call(tuner, x), call(tuner, x)) and tuner.penalty() is None
    tuner.train()
    assert not torch.equal(call(tuner, x), call(tuner, x)) and tuner.penalty() > 0
    tuner = ours(Chain(None, nn.Linear(16, 8)), veneer.PveraConfig(r=4, target_modules=["layer"]), size=0.5)
    mean = call(tuner, x[:1])
    many = call(tuner.train(), x[:1].expand(4000, -1))  # a draw for each row
    assert many.std(0).max() > 1e-3 and near(many.mean(0, keepdim=True), mean, 0.05)


def test_pvera_generator_seed_repeats_the_draws() -> None:
    def run() -> torch.Tensor:
        tuner = ours(two(), veneer.PveraConfig(r=4, generator_seed=7, sample_at_inference=True, **UP_DOWN))
        return call(tuner, x16())

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    assert torch.equal(first, run())


def test_osf_keeps_the_leading_directions() -> None:
    tuner, x = ours(two(), veneer.OSFConfig(effective_rank=4, target_modules=["up"]), size=0.0), x16()
    w = tuner.model.up.base_layer.weight.detach()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    assert near(call(tuner, x), two()(x), 1e-5)
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (call(tuner, x) - 1).square().sum().backward()
        optimizer.step()
    adapter = adapters(tuner)[0]
    change = adapter.delta_weight()
    assert change.norm() > 0.1
    assert (u[:, :4].T @ change).abs().max() < 1e-4 * change.norm() and (
        change @ vh[:4].T
    ).abs().max() < 1e-4 * change.norm()


def test_adamss_trains_ever_fewer_subspaces() -> None:
    config = veneer.AdamssConfig(
        r=8,
        num_subspaces=4,
        use_asa=True,
        asa_target_subspaces=3,
        init_warmup=2,
        final_warmup=10,
        mask_interval=2,
        **UP_DOWN,
    )
    tuner, x = ours(two(), config).train(), x16()
    parts = adapters(tuner)
    total = sum(len(a.rows) for a in parts)
    optimizer = torch.optim.Adam([p for p in tuner.parameters() if p.requires_grad], lr=0.05)
    alive, kept = [], {}
    for step in range(1, 13):
        optimizer.zero_grad()
        (call(tuner, x) - 1).square().mean().backward()
        optimizer.step()
        tuner.after_step(step)
        alive.append(sum(p.requires_grad for a in parts for p in a.adamss_B))
        for i, a in enumerate(parts):
            for c in a.out_of_budget:
                before = kept.setdefault((i, c), a.adamss_B[c].detach().clone())
                assert torch.equal(a.adamss_B[c], before)
    assert alive[1] == total and alive[-1] == 3 and alive == sorted(alive, reverse=True) and len(set(alive)) > 2
    tuner.set_active()
    tuner.set_active("default")
    assert sum(p.requires_grad for a in parts for p in a.adamss_B) == 3


def test_supertuning_takes_the_largest_or_smallest_entries() -> None:
    for top in (True, False):
        tuner = ours(two(), veneer.SupertuningConfig(sparsity=0.9, select_top=top, target_modules=["up"]))
        w = tuner.model.up.base_layer.weight.detach().abs().flatten()
        chosen = torch.zeros_like(w, dtype=torch.bool)
        chosen[adapters(tuner)[0].supertuning_indices.long()] = True
        assert chosen.sum() == 38
        assert w[chosen].min() >= w[~chosen].max() if top else w[chosen].max() <= w[~chosen].min()


def test_shira_trains_where_a_mask_says(tmp_path: Path) -> None:
    config = veneer.ShiraConfig(r=1, mask_type="diagonal", target_modules=["up"])
    with pytest.raises(ValueError, match="mask_fn"):
        Tuner(two()).add("default", config)
    config.mask_fn = lambda layer, r, **kwargs: torch.eye(*layer.weight.shape)
    tuner = ours(two(), config)
    change = adapters(tuner)[0].delta_weight()  # (24, 16)
    assert torch.equal(change, change * torch.eye(24, 16)) and change.diagonal().abs().min() > 0
    write(tuner, tmp_path)
    assert near(call(read(two(), tmp_path), x16()), call(tuner, x16()), 1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: veneer.C3AConfig(block_size=5, **UP_DOWN), "block_size"),
        (lambda: veneer.VBLoRAConfig(vector_length=5, num_vectors=6, **UP_DOWN), "vector_length"),
        (lambda: veneer.VBLoRAConfig(vector_length=4, num_vectors=1, **UP_DOWN), "bank"),
        (lambda: veneer.WaveFTConfig(n_frequency=4, wavelet_family="bior2.2", **UP_DOWN), "wavelet"),
        (lambda: veneer.WaveFTConfig(n_frequency=4, random_loc_seed=None, **UP_DOWN), "random_loc_seed"),
        (lambda: veneer.FourierFTConfig(n_frequency=1000, **UP_DOWN), "n_frequency"),
        (lambda: veneer.TinyLoraConfig(r=9, **UP_DOWN), "singular directions"),
        (lambda: veneer.ShiraConfig(r=32, **UP_DOWN), "lower r"),
        (lambda: veneer.PeanutConfig(act_fn="nope", **UP_DOWN), "act_fn"),
        (lambda: veneer.FrodConfig(save_projection=False, **UP_DOWN), "save_projection"),
        (lambda: veneer.OSFConfig(effective_rank=8, **UP_DOWN), "effective_rank"),
        (lambda: veneer.AdamssConfig(use_asa=True, init_warmup=9, final_warmup=9, **UP_DOWN), "init_warmup"),
        (lambda: veneer.LoHaConfig(r=0, **UP_DOWN), "positive"),
        (lambda: veneer.SupertuningConfig(lora_alpha=2.0, **UP_DOWN), "lora_alpha"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(config, words: str) -> None:
    model = two()
    with pytest.raises(ValueError, match=words) as error:
        Tuner(model).add("default", config())
    assert str(error.value).endswith(".") and type(model.up) is nn.Linear


def test_noise_for_each_token_needs_the_input() -> None:
    with pytest.raises(ValueError, match="only its weight can be reached"):
        Tuner(Chain(nn.Linear(8, 8), SelfAttention())).add(
            "default", veneer.PveraConfig(r=2, target_modules=["layer.attn"])
        )


def slope(f: Callable[[], torch.Tensor], at: torch.Tensor, step: float = 1e-3) -> torch.Tensor:
    """df/d(at) by finite differences."""
    flat, out = at.data.view(-1), []
    for i in range(flat.numel()):
        start, ends = flat[i].item(), []
        for sign in (1, -1):
            flat[i] = start + sign * step
            ends.append(f().item())
        flat[i] = start
        out.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(out, dtype=at.dtype).view_as(at)


@needs_peer
def test_gradients_that_the_peer_has_wrong_are_right_here() -> None:
    """So parity compares none there: of a LoHa core, and of what C3A hands down to the layer below."""
    import peft

    def off(model: nn.Module, at: torch.Tensor, x: torch.Tensor) -> float:
        model.zero_grad()
        model(x).square().mean().backward()
        true = slope(lambda: model(x).square().mean().double(), at)
        return float((at.grad - true).abs().max() / true.abs().max())

    torch.manual_seed(2)
    for method, base, options in (
        ("C3A", lambda: Chain(None, nn.Linear(8, 12)), {"block_size": 4, "init_weights": "gaussian"}),
        ("LoHa", lambda: Chain(None, nn.Conv2d(4, 8, 3)), {"r": 2, "use_effective_conv2d": True}),
    ):
        x = torch.randn((2, 3, 8) if method == "C3A" else (1, 4, 4, 4), dtype=torch.float64, requires_grad=True)
        theirs = peer(base(), getattr(peft, f"{method}Config")(target_modules=["layer"], **options), size=1.0).double()
        tuner = ours(base().double(), getattr(veneer, f"{method}Config")(target_modules=["layer"], **options), size=1.0)
        first = [next(p for p in model.parameters() if p.requires_grad) for model in (tuner, theirs)]
        here, there = (x, x) if method == "C3A" else first
        assert off(tuner, here, x) < 1e-4
        x.grad = None
        assert off(theirs, there, x) > 1e-2
