"""LoRA: the formula, parity with the peer on every layer kind and option, and the traps of its layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from laws.kinds import KINDS, Chain
from parity import both_ways, call, near, needs_peer, ours, peer, read
from veneer import LoraConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.hf.convert import add_attention_output_twice


def base_of(kind: str):
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = KINDS[kind].build().eval()
        if kind == "conv1d_hf":  # the peer knows transformers' own class only
            from transformers.pytorch_utils import Conv1D

            ours_alone, model.layer = model.layer, Conv1D(16, 8)
            model.layer.load_state_dict(ours_alone.state_dict())
        return model

    return build


def inputs_of(kind: str) -> torch.Tensor:
    torch.manual_seed(9)
    return KINDS[kind].inputs()


def test_forward_and_gradients_are_the_papers() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5).double(), torch.randn(3, 4, 7, dtype=torch.float64)
    tuner = ours(Chain(None, layer), LoraConfig(r=3, lora_alpha=6, target_modules=["layer"]))
    adapter = next(iter(tuner.adapters("default")))[1]
    a, b = adapter.lora_A.weight, adapter.lora_B.weight
    assert a.dtype == torch.float64
    y = tuner(x)
    weight = (layer.weight + 2.0 * b @ a).detach().requires_grad_()
    expected = x @ weight.T + layer.bias
    assert torch.allclose(y, expected, atol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    g = weight.grad  # dL/dW'
    assert torch.allclose(a.grad, 2.0 * b.T @ g, atol=1e-9) and torch.allclose(b.grad, 2.0 * g @ a.T, atol=1e-9)


def test_rslora_scale_does_not_fall_with_rank() -> None:
    for r in (4, 16, 256):
        assert LoraConfig(r=r, lora_alpha=8, use_rslora=True).scaling == 8 / math.sqrt(r)

    def strength(r: int) -> float:
        torch.manual_seed(0)
        tuner = ours(Chain(None, nn.Linear(64, 64)), LoraConfig(r=r, use_rslora=True, target_modules=["layer"]))
        adapter = next(iter(tuner.adapters("default")))[1]
        nn.init.normal_(adapter.lora_A.weight)
        nn.init.normal_(adapter.lora_B.weight)
        return adapter.delta(torch.randn(512, 64)).detach().square().mean().sqrt().item()

    assert abs(strength(4) / strength(256) - 1) < 0.2


def test_parameter_count() -> None:
    tuner = ours(Chain(None, nn.Linear(20, 12)), LoraConfig(r=4, target_modules=["layer"]))
    assert sum(p.numel() for p in tuner.parameters() if p.requires_grad) == 4 * (20 + 12)


OPTIONS = {
    "plain": {},
    "alpha": {"lora_alpha": 24},
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "lora_bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.3},
    "odd_rank": {"r": 3},
}
WEIGHT_ONLY = ("parameter", "experts")
NO = {("embedding", "lora_bias"), ("conv2d_grouped", "odd_rank")}
NO |= {(kind, option) for kind in WEIGHT_ONLY for option in ("dropout", "lora_bias")}
"""What both sides refuse, or (an odd rank over groups) the peer alone."""
BY_KIND = [
    "linear", "linear_no_bias", "conv1d_hf", "conv1d", "conv2d", "conv2d_1x1", "conv2d_grouped", "embedding",
    *WEIGHT_ONLY,
]  # fmt: skip


@needs_peer
@pytest.mark.parametrize(("kind", "option"), [(k, o) for k in BY_KIND for o in OPTIONS if (k, o) not in NO])
def test_parity(kind: str, option: str, tmp_path) -> None:
    import peft

    settings = {"r": 4} | OPTIONS[option] | KINDS[kind].targets
    grouped = kind == "conv2d_grouped"  # there the peer's A reaches across the groups: its gradient has more entries
    both_ways(
        base_of(kind), peft.LoraConfig(**settings), LoraConfig(**settings), inputs_of(kind), tmp_path,
        grad_tolerance=None if grouped else 2e-4,
    )  # fmt: skip


class Small(nn.Module):
    """A little of everything that options name: layers by number, a table, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8, bias=False)}) for _ in range(3)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + torch.tanh(layer["q"](h)) + layer["v"](h)
        return self.head(self.norm(h))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@needs_peer
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q", "v"], "bias": "all"},
        {"target_modules": ["q", "v"], "bias": "lora_only"},
        {"target_modules": ["q", "v"], "modules_to_save": ["head", "norm"]},
        {"target_modules": ["q"], "rank_pattern": {"layers.1.q": 2}, "alpha_pattern": {r"layers\.[02]\.q": 32}},
        {"target_modules": ["q", "v"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": r".*\.[12]\.(q|v)"},
        {"target_modules": ["q", "v", "embed"], "exclude_modules": ["layers.0.q"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q"], "trainable_token_indices": {"embed": [1, 5, 7]}},
        {"target_modules": ["q"], "modules_to_save": ["embed"], "bias": "lora_only", "use_rslora": True},
    ],
    ids=lambda s: "+".join(k for k in s if k != "target_modules") or str(s["target_modules"]),
)  # fmt: skip
def test_parity_of_options(settings: dict, tmp_path) -> None:
    import peft

    ids = torch.arange(12).reshape(2, 6)
    both_ways(small, peft.LoraConfig(r=4, **settings), LoraConfig(r=4, **settings), ids, tmp_path)


@needs_peer
def test_a_grouped_adapter_of_the_peer_runs_and_says_why_it_cannot_merge(tmp_path) -> None:
    import peft

    base, x = base_of("conv2d_grouped"), inputs_of("conv2d_grouped")
    theirs = peer(base(), peft.LoraConfig(r=4, target_modules=["layer"]))
    theirs.save_pretrained(tmp_path)
    tuner = read(base(), tmp_path)
    assert near(tuner(x), call(theirs, x), 2e-5)
    with pytest.raises(ValueError, match="mixes the layer's 2 groups"):
        tuner.merge()
    assert checkpoint.tensors(tuner, "default")["base_model.model.layer.lora_A.weight"].shape == (4, 8, 3, 3)


def test_our_grouped_adapter_merges_and_returns_grouped_from_its_file(tmp_path) -> None:
    base, x = base_of("conv2d_grouped"), inputs_of("conv2d_grouped")
    tuner = ours(base(), LoraConfig(r=4, target_modules=["layer"]))
    found = checkpoint.tensors(tuner, "default")
    assert found["base_model.model.layer.lora_A.weight"].shape == (4, 8, 3, 3)
    again = Tuner(base())
    again.add("default", LoraConfig(r=4, target_modules=["layer"]))
    assert checkpoint.put(again, "default", found).clean
    again.set_active("default")
    again.eval().merge()
    assert near(again(x), tuner(x), 2e-5)


@needs_peer
def test_attention_has_its_output_projection_once_where_the_peer_has_it_twice(tmp_path) -> None:
    import peft

    base, x = base_of("mha"), inputs_of("mha")
    theirs = peer(base(), peft.LoraConfig(r=4, target_modules=["layer.attn"]))
    expected = call(theirs, x)
    theirs.save_pretrained(tmp_path)
    tuner = read(base(), tmp_path)
    assert not near(tuner(x), expected, 1e-4)
    once = tuner(x)
    add_attention_output_twice(tuner)
    assert near(tuner(x), expected, 2e-5)
    add_attention_output_twice(tuner, on=False)
    assert near(tuner(x), once, 0)


@needs_peer
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(8, 16, 3, dilation=2),
        lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(8, 16, (3, 1), dilation=(2, 1), stride=(2, 1)),
        lambda: nn.Conv3d(8, 16, (1, 1, 3)),
    ],
    ids=["dilated", "circular", "odd", "conv3d_113"],
)
def test_convolutions_that_the_peer_breaks_on(layer) -> None:
    torch.manual_seed(0)
    conv = layer()
    x = torch.randn(2, 8, *([8] * (conv.weight.dim() - 2)))
    tuner = ours(Chain(None, conv), LoraConfig(r=4, target_modules=["layer"]))
    y = tuner(x)
    tuner.merge()
    assert near(tuner(x), y, 2e-5)


def test_scaled_embedding_scales_its_delta() -> None:
    class Scaled(nn.Embedding):
        def __init__(self):
            super().__init__(10, 6)
            self.register_buffer("embed_scale", torch.tensor(3.0))

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    torch.manual_seed(0)
    tuner = ours(Chain(None, Scaled()), LoraConfig(r=2, target_modules=["layer"]))
    ids = torch.arange(10)
    y = tuner(ids)
    tuner.merge()
    assert near(tuner(ids), y, 1e-5)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"r": 0}, "positive integer"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"init_lora_weights": "pisa"}, "Unknown initialization init_lora_weights='pisa'"),
        ({"rank_pattern": {"layer": -1}}, "positive integer"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings: dict, error: str) -> None:
    tuner = Tuner(Chain(None, nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=error):
        tuner.add("a", LoraConfig(target_modules=["layer"], **settings))
    assert not tuner.configs
