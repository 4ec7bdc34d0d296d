"""Rows of LoRA's variants and of AdaLoRA."""

from __future__ import annotations

from functools import partial

from laws.kinds import ALL, WEIGHTS
from laws.table import Row
from veneer import AdaLoraConfig, LoraConfig

ADALORA = partial(AdaLoraConfig, init_r=4, target_r=2, total_step=100)

ROWS = [
    Row("dora", partial(LoraConfig, r=4, use_dora=True)),
    Row("dora_rslora_gaussian", partial(LoraConfig, r=4, use_dora=True, use_rslora=True, init_lora_weights="gaussian"),
        tested=frozenset({"linear", "conv2d", "embedding"})),
    Row("adalora", ADALORA),
    Row("adalora_dropout", partial(ADALORA, lora_dropout=0.5), kinds=ALL - WEIGHTS),
    Row("dora_dropout", partial(LoraConfig, r=4, use_dora=True, lora_dropout=0.5), kinds=ALL - WEIGHTS),
]  # fmt: skip
