"""Shared, spectral and sparse methods: the peer's folders read by us and ours by the peer, for each of its options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from laws.kinds import Chain
from parity import both_ways, needs_peer

pytestmark = needs_peer


class Two(nn.Module):
    """Layers of two widths, so that what is shared is cut for one of them."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=bias), nn.Linear(24, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    """Three times the same two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def two() -> nn.Module:
    torch.manual_seed(0)
    return Two()


def no_bias() -> nn.Module:
    torch.manual_seed(0)
    return Two(bias=False)


def deep() -> nn.Module:
    torch.manual_seed(0)
    return Deep()


def turned() -> nn.Module:
    torch.manual_seed(0)
    return Chain(nn.Linear(16, 12), Conv1D(8, 12))


def conv1d() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Conv1d(4, 8, 3, padding=2, dilation=2))


def conv2d() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Conv2d(4, 8, 3, stride=2, padding=1))


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Conv2d(4, 8, 3, padding=1, groups=2))


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Embedding(20, 8), nn.Linear(8, 3))


INPUTS = {
    **dict.fromkeys((two, no_bias, deep, turned), lambda: torch.randn(4, 3, 16)),
    conv1d: lambda: torch.randn(2, 4, 7),
    conv2d: lambda: torch.randn(2, 4, 6, 6),
    grouped: lambda: torch.randn(2, 4, 5, 5),
    embedding: lambda: torch.randint(0, 20, (4, 5)),
}
BOTH = (two, no_bias)
CONVS = (conv1d, conv2d, grouped)
BANK = {"r": 2, "num_vectors": 6, "vector_length": 4}
TURNED = {"fan_in_fan_out": True}
CASES = [
    *(("LoHa", {"r": 2, "alpha": 3}, base) for base in (*BOTH, *CONVS)),
    *(("LoHa", {"r": 2, "use_effective_conv2d": True}, base) for base in CONVS),
    ("LoHa", {"r": 2, "init_weights": False, "rank_dropout": 0.2, "module_dropout": 0.2}, two),
    ("LoHa", {"r": 2, "rank_pattern": {"up": 3}, "alpha_pattern": {"down": 5}}, two),
    *(("LoKr", {"r": r, "alpha": 3}, base) for r in (1, 2, 8) for base in (*BOTH, *CONVS)),
    *(("LoKr", {"r": 1, "use_effective_conv2d": True}, base) for base in (conv2d, grouped)),
    *(("LoKr", {"r": 1, "decompose_both": True, "decompose_factor": f}, two) for f in (-1, 2, 3, 4, 5, 12, 16)),
    *(("LoKr", {"r": 1, "init_weights": how, "rank_dropout": 0.2}, two) for how in (False, "lycoris")),
    *(("Vera", {"r": 4, "save_projection": saved}, base) for saved in (True, False) for base in (two, deep)),
    ("Vera", {"r": 4, "projection_prng_key": 5, "d_initial": 0.3, "vera_dropout": 0.3}, no_bias),
    ("Vera", {"r": 4, **TURNED}, turned),
    *(("Pvera", {"r": 4, "save_projection": saved}, base) for saved in (True, False) for base in (two, deep)),
    ("Pvera", {"r": 4, **TURNED}, turned),
    *(("VBLoRA", {**BANK, "topk": k}, base) for k in (1, 2, 3) for base in BOTH),
    ("VBLoRA", {**BANK, **TURNED}, turned),
    ("VBLoRA", {**BANK, "save_only_topk_weights": True}, two),
    *(("RandLora", {"r": 4, "randlora_alpha": 8, **how}, base) for how in (
        {}, {"save_projection": False}, {"sparse": True}, {"very_sparse": True},
        {"sparse": True, "save_projection": False}, {"very_sparse": True, "save_projection": False},
    ) for base in (two, deep)),
    ("RandLora", {"r": 5, "randlora_alpha": 8, "projection_prng_key": 3}, no_bias),
    ("RandLora", {"r": 4, "randlora_alpha": 8, **TURNED}, turned),
    *(("TinyLora", {"r": 2, "u": 6, "weight_tying": t}, deep) for t in (0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.75, 0.9, 1.0)),
    *(("TinyLora", {"r": 3, "u": 4, "save_projection": False, "projection_seed": 7}, base) for base in BOTH),
    ("TinyLora", {"r": 2, "u": 6, **TURNED}, turned),
    ("TinyLora", {"r": 2, "u": 6}, embedding),
    *(("UniLora", {"r": 2, "theta_d_length": n, "save_indices": saved}, base)
      for n in (7, 32, 1000) for saved in (True, False) for base in (two, deep)),
    ("UniLora", {"r": 2, "theta_d_length": 32, "proj_seed": 3}, no_bias),
    ("UniLora", {"r": 2, "theta_d_length": 32, **TURNED}, turned),
    *(("FourierFT", {"n_frequency": 20, "scaling": 20.0, "init_weights": how}, base)
      for how in (True, False) for base in BOTH),
    ("FourierFT", {"n_frequency": 20, "n_frequency_pattern": {"up": 30}, "random_loc_seed": 5}, two),
    ("FourierFT", {"n_frequency": 20, **TURNED}, turned),
    *(("WaveFT", {"n_frequency": 20, "scaling": 5.0, "wavelet_family": w}, two)
      for w in ("db1", "db2", "db3", "db4", "db7", "sym4", "coif1")),
    *(("WaveFT", {"n_frequency": 20, **how}, base) for how in (
        {"use_idwt": False}, {"init_weights": False}, {"proportional_parameters": True},
        {"n_frequency_pattern": {"up": 9}},
    ) for base in BOTH),
    ("WaveFT", {"n_frequency": 20, **TURNED}, turned),
    *(("C3A", {"block_size": b, "init_weights": how}, base)
      for b in (1, 4, 8) for how in (True, "gaussian") for base in BOTH),
    ("C3A", {"block_size": 2, "block_size_pattern": {"up": 4}}, two),
    *(("Shira", {"r": 2, "random_seed": seed}, base) for seed in (None, 3) for base in BOTH),
    *(("Supertuning", {"sparsity": 0.9, "select_top": top, "r": r}, base)
      for top in (True, False) for r in (None, 2) for base in BOTH),
    *(("Supertuning", {"sparsity": s, "save_precomputed_indices": False}, two) for s in (0.0, 0.7, 0.9, 0.99)),
    ("Supertuning", {"sparsity": 0.9, "r": 2, "lora_alpha": 3.0, "lora_dropout": 0.2}, two),
    *(("Peanut", {"r": 3, "depth": d, "act_fn": act, "scaling": 0.5}, base)
      for d in (0, 1, 2) for act in ("relu", "gelu", "silu", "tanh") for base in BOTH),
    *(("Frod", {"sparse_rate": 0.1, "progressbar": False}, base) for base in (two, deep)),
    *(("OSF", {"effective_rank": k}, base) for k in (None, 3, 0.6) for base in BOTH),
    ("OSF", {"effective_rank": 3, "rank_pattern": {"up": 5}}, two),
    *(("Adamss", {"r": 6, "num_subspaces": k, "subspace_rank": 2, "random_seed": seed}, base)
      for k in (1, 2, 4) for seed in (0, 3) for base in BOTH),
    *(("Adamss", {"r": 8, "num_subspaces": 3, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": t}, two)
      for t in (0.1, 0.5, 0.9)),
    ("Adamss", {"r": 12}, deep),
]  # fmt: skip
TARGETS = {two: ["up", "down"], no_bias: ["up", "down"], deep: ["up", "down"]}


def name(case: tuple[str, dict, Callable]) -> str:
    return "-".join([case[0].lower(), *(f"{k}={v}" for k, v in case[1].items()), case[2].__name__])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_both_ways(case: tuple[str, dict, Callable], tmp_path: Path) -> None:
    import peft

    method, options, base = case
    torch.manual_seed(1)
    x = INPUTS[base]()
    settings = {**options, "target_modules": TARGETS.get(base, ["layer"])}
    # The peer's gradients are not those of its own forward there: see test_shared_traps.py.
    wrong = method == "C3A" or options.get("use_effective_conv2d") and method == "LoHa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = getattr(peft, f"{method}Config")(**settings), getattr(veneer, f"{method}Config")(**settings)
        both_ways(base, theirs, ours, x, tmp_path, grad_tolerance=None if wrong else 2e-4)
