"""Rotating methods: the peer's folders read by us and ours by the peer, for each of its options."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from laws.kinds import Chain
from parity import both_ways, needs_peer

pytestmark = needs_peer


def linear() -> nn.Module:
    torch.manual_seed(0)
    return Chain(nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3))


def no_bias() -> nn.Module:
    torch.manual_seed(0)
    return Chain(nn.Linear(6, 12), nn.Linear(12, 8, bias=False))


def conv2d() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Conv2d(4, 8, 3, stride=2, padding=1))


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Embedding(20, 8), nn.Linear(8, 3))


INPUTS = {
    linear: lambda: torch.randn(4, 3, 6),
    no_bias: lambda: torch.randn(4, 6),
    conv2d: lambda: torch.randn(2, 4, 6, 6),
    embedding: lambda: torch.randint(0, 20, (4, 5)),
}
BOTH = (linear, no_bias)
CASES = [
    *(("OFT", {"oft_block_size": b}, base, 0.1) for b in (4, 6, 5, 32) for base in BOTH),
    *(("OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": n}, linear, 0.1) for n in (2, 3, 4, 6, 7)),
    *(("OFT", {"oft_block_size": 4, "use_cayley_neumann": False}, base, 0.2) for base in (*BOTH, embedding)),
    ("OFT", {"oft_block_size": 4}, embedding, 0.1),
    ("OFT", {"oft_block_size": 0, "r": 2, "block_share": True}, linear, 0.1),
    ("OFT", {"oft_block_size": 0, "r": 5, "init_weights": False}, linear, 0.1),
    ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.1}, linear, 0.2),
    ("OFT", {"oft_block_size": 4, "coft": True, "eps": 0.1, "block_share": True}, linear, 0.2),
    ("OFT", {"oft_block_size": 4, "bias": "oft_only"}, linear, 0.1),
    *(("BOFT", {"boft_block_size": b}, base, 0.2) for b in (2, 3, 4) for base in (*BOTH, conv2d)),
    ("BOFT", {"boft_block_size": 0, "boft_block_num": 3}, linear, 0.2),
    ("BOFT", {"bias": "boft_only"}, linear, 0.2),
    *(("HRA", {"r": r}, base, 0.3) for r in (3, 4) for base in (*BOTH, conv2d)),
    *(("HRA", {"r": r, "apply_GS": True, "init_weights": False}, base, 0.3)
      for r in (1, 4) for base in (*BOTH, conv2d)),
    *(("ROAD", {"variant": f"road_{n}", "group_size": g}, base, 0.2)
      for n in (1, 2, 4) for g in (4, 8) for base in BOTH),
    *(("PSOFT", {"r": 4, **options}, base, 0.1) for base in BOTH for options in (
        {}, {"psoft_alpha": 8}, {"ab_svd_init": "pissa_init", "psoft_alpha": 8}, {"use_cayley_neumann": True},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, {"psoft_orth": False}, {"psoft_mag_a": False},
        {"psoft_mag_b": False}, {"psoft_svd": "lowrank", "random_seed": 3},
        {"use_cayley_neumann": True, "cayley_neumann_eps": 0.1, "psoft_mag_a": False, "psoft_mag_b": False},
    )),
]  # fmt: skip
CLASSES = {"OFT": "OFTConfig", "BOFT": "BOFTConfig", "HRA": "HRAConfig", "ROAD": "RoadConfig", "PSOFT": "PsoftConfig"}


def name(case: tuple[str, dict, Callable, float]) -> str:
    return "-".join([case[0].lower(), *(f"{k}={v}" for k, v in case[1].items()), case[2].__name__])


@pytest.mark.parametrize("case", CASES, ids=name)
def test_both_ways(case: tuple[str, dict, Callable, float], tmp_path: Path) -> None:
    import peft

    method, options, base, size = case
    torch.manual_seed(1)
    x = INPUTS[base]()
    settings = {**options, "target_modules": ["layer"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = getattr(peft, CLASSES[method])(**settings), getattr(veneer, CLASSES[method])(**settings)
        both_ways(base, theirs, ours, x, tmp_path, size=size)
