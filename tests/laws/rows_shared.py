"""Rows of the methods that share tensors among layers, or build a change of high rank from few numbers."""

from __future__ import annotations

from functools import partial

from laws.kinds import ALL, CONV, WEIGHTS
from laws.table import Row
from veneer import (
    AdamssConfig,
    FrodConfig,
    LoHaConfig,
    LoKrConfig,
    LoraXSConfig,
    OSFConfig,
    PeanutConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

SOME = frozenset({"linear", "conv2d", "embedding", "experts"})
BANK = {"num_vectors": 6, "vector_length": 2}
NO_NOISE = WEIGHTS | {"conv2d_grouped"}
"""Where noise cannot be drawn for each token."""

ROWS = [
    Row("loha", partial(LoHaConfig, r=2)),
    Row("loha_core", partial(LoHaConfig, r=2, use_effective_conv2d=True), tested=CONV),
    Row("loha_dropout", partial(LoHaConfig, r=2, rank_dropout=0.3, module_dropout=0.1), tested=SOME),
    Row("lokr", partial(LoKrConfig, r=1)),
    Row("lokr_both", partial(LoKrConfig, r=1, decompose_both=True, decompose_factor=2), tested=SOME),
    Row("lokr_core", partial(LoKrConfig, r=1, use_effective_conv2d=True), tested=CONV),
    Row("lokr_full", partial(LoKrConfig, r=8, init_weights="lycoris"), tested=SOME),
    Row("lokr_dropout", partial(LoKrConfig, r=1, rank_dropout=0.3, module_dropout=0.1), tested=SOME),
    Row("vera", partial(VeraConfig, r=4)),
    Row("vera_drawn", partial(VeraConfig, r=4, save_projection=False), tested=SOME),
    Row("pvera", partial(PveraConfig, r=4), kinds=ALL - NO_NOISE),
    Row("vblora", partial(VBLoRAConfig, r=2, **BANK), zero_start=False),
    Row("vblora_topk", partial(VBLoRAConfig, r=2, save_only_topk_weights=True, **BANK), tested=SOME, zero_start=False),
    Row("randlora", partial(RandLoraConfig, r=4, randlora_alpha=4)),
    Row(
        "randlora_sparse",
        partial(RandLoraConfig, r=4, randlora_alpha=4, sparse=True, save_projection=False),
        tested=SOME,
    ),
    Row("tinylora", partial(TinyLoraConfig, r=2, u=5)),
    Row("tinylora_tied", partial(TinyLoraConfig, r=2, u=5, weight_tying=1.0, save_projection=False), tested=SOME),
    Row("lora_xs", partial(LoraXSConfig, r=3, init_std=0.1), zero_start=False),
    Row("unilora", partial(UniLoraConfig, r=2, theta_d_length=20), zero_start=False),
    Row(
        "unilora_saved",
        partial(UniLoraConfig, r=2, theta_d_length=20, save_indices=True),
        tested=SOME,
        zero_start=False,
    ),
    Row("peanut", partial(PeanutConfig, r=3, depth=1, act_fn="gelu")),
    Row("frod", partial(FrodConfig, sparse_rate=0.1)),
    Row("osf", partial(OSFConfig, effective_rank=4)),
    Row("adamss", partial(AdamssConfig, r=6, num_subspaces=2, subspace_rank=2)),
]
