"""Methods that scale, shift or reweight, and small additive ones: parity with the peer for each of its options."""

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
from methods.test_rotation_parity import BOTH, INPUTS, conv2d, embedding, linear, name, no_bias
from parity import both_ways, call, near, needs_peer, ours, peer, read

pytestmark = needs_peer


def conv1d() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Conv1d(4, 8, 3, padding=2, dilation=2))


def conv3d() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Conv3d(4, 8, (1, 1, 3)))


def grouped() -> nn.Module:
    torch.manual_seed(0)
    return Chain(None, nn.Conv2d(4, 8, 3, padding=1, groups=2))


def conv1d_hf() -> nn.Module:
    torch.manual_seed(0)
    return Chain(nn.Linear(6, 12), Conv1D(8, 12))


def norm() -> nn.Module:
    torch.manual_seed(0)
    return Chain(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3))


MORE = {
    conv1d: lambda: torch.randn(2, 4, 7),
    conv3d: lambda: torch.randn(2, 4, 2, 2, 5),
    grouped: lambda: torch.randn(2, 4, 5, 5),
    conv1d_hf: lambda: torch.randn(4, 3, 6),
    norm: lambda: torch.randn(4, 3, 6),
}
TURNED = {"fan_in_fan_out": True}
CASES = [
    *(("IA3", {"feedforward_modules": ff}, base, 0.2) for ff in ([], ["layer"]) for base in (*BOTH, conv2d, conv3d)),
    *(("IA3", {"feedforward_modules": ff, **TURNED}, conv1d_hf, 0.2) for ff in ([], ["layer"])),
    ("IA3", {"feedforward_modules": [], "init_ia3_weights": False}, linear, 0.2),
    ("IA3", {"feedforward_modules": []}, grouped, 0.2),
    *(("Beft", {}, base, 0.2) for base in BOTH),
    *(("LNTuning", {}, base, 0.2) for base in (norm, linear, conv2d, embedding)),
    *(("Hira", {"r": 3, "init_weights": how}, linear, 0.2) for how in (True, "gaussian", False)),
    *(("Hira", {"r": 3, "hira_dropout": 0.5}, base, 0.2) for base in (linear, conv2d)),
    *(("Hira", {"r": 3}, base, 0.2) for base in (no_bias, conv1d, conv2d, embedding)),
    ("Hira", {"r": 3, **TURNED}, conv1d_hf, 0.2),
    *(("Glora", {"r": 2, "config_A_B": ab, "config_C": c, "config_D_E": de}, linear, 0.2)
      for ab in ("lora", "vector", "constant", "none") for c in ("lora", "vector", "none")
      for de in ("vector", "constant", "none") if {ab, c, de} != {"none"}),
    ("Glora", {"r": 2}, no_bias, 0.2),
    *(
        ("Deft", {"r": 3, "decomposition_method": how, "para": para, "alpha": alpha}, base, 0.2)
        for how in ("relu", "qr") for para in (False, True) for alpha in (None, 6) for base in BOTH
    ),
    ("Deft", {"r": 3, "init_weights": False, "init_scale": 2.0}, linear, 0.2),
    ("Deft", {"r": 3, **TURNED}, conv1d_hf, 0.2),
    ("Deft", {"r": 3, "bias": "deft_only"}, linear, 0.2),
    *(("Miss", {"r": r, "init_weights": how}, base, 0.2) for r in (4, 5) for how in (True, False) for base in BOTH),
    *(("Miss", {"r": r, "init_weights": "bat"}, base, 0.2) for r in (2, 4) for base in BOTH),
    *(("Miss", {"r": 4, "mini_r": m, "init_weights": "mini"}, base, 0.2) for m in (1, 2, 8) for base in BOTH),
    *(("Delora", {"r": 3, "delora_lambda": size}, base, 0.2) for size in (15, 4) for base in BOTH),
    ("Delora", {"r": 3, "rank_pattern": {"layer": 2}, "lambda_pattern": {"layer": 7}}, linear, 0.2),
    *(("Gralora", {"r": 4, "gralora_k": k, "hybrid_r": h}, base, 0.2)
      for k in (1, 2, 4) for h in (0, 2) for base in BOTH),
    ("Gralora", {"r": 4, "hybrid_r": 2, **TURNED}, conv1d_hf, 0.2),
    ("TrainableTokens", {"token_indices": [1, 5]}, embedding, 0.2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=name)
def test_both_ways(case: tuple[str, dict, Callable, float], tmp_path: Path) -> None:
    import peft

    method, options, base, size = case
    torch.manual_seed(1)
    x = {**INPUTS, **MORE}[base]()
    settings = {**options, "target_modules": ["layer"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = getattr(peft, f"{method}Config")(**settings), getattr(veneer, f"{method}Config")(**settings)
        both_ways(base, theirs, ours, x, tmp_path, size=size)


def test_glora_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        ours(no_bias(), veneer.GloraConfig(target_modules=["layer"], config_A_B="none"))


def test_hira_honours_rank_pattern_and_reads_files_of_the_peer_which_does_not(tmp_path: Path) -> None:
    import peft

    settings = {"r": 3, "rank_pattern": {"layer": 2}, "target_modules": ["layer"]}
    theirs = peer(linear(), peft.HiraConfig(**settings))
    theirs.save_pretrained(tmp_path)
    x = INPUTS[linear]()
    assert near(call(read(linear(), tmp_path), x), call(theirs, x), 1e-5)
    tuner = ours(linear(), veneer.HiraConfig(**settings))
    assert next(tuner.adapters("default"))[1].hira_A.shape == (2, 12)
