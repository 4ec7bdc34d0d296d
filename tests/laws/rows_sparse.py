"""Rows of the methods that train single entries of the weight."""

from __future__ import annotations

from functools import partial

from laws.table import Row
from veneer import ShiraConfig, SupertuningConfig

SOME = frozenset({"linear", "conv2d", "embedding", "experts"})

ROWS = [
    Row("shira", partial(ShiraConfig, r=1)),
    Row("shira_seeded", partial(ShiraConfig, r=1, random_seed=3), tested=SOME),
    Row("supertuning", partial(SupertuningConfig, sparsity=0.8)),
    Row("supertuning_lora", partial(SupertuningConfig, sparsity=0.8, r=2, lora_alpha=3.0), tested=SOME),
    Row("supertuning_found", partial(SupertuningConfig, sparsity=0.8, save_precomputed_indices=False), tested=SOME),
]
