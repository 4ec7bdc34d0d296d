"""LoRA's rows."""

from __future__ import annotations

from functools import partial

from laws.kinds import ALL, CONV, WEIGHTS
from laws.table import Row
from veneer import LoraConfig

ROWS = [
    Row("lora", partial(LoraConfig, r=4)),
    Row("lora_gaussian", partial(LoraConfig, r=4, init_lora_weights="gaussian")),
    Row("rslora", partial(LoraConfig, r=4, use_rslora=True), tested=frozenset({"linear", "conv2d", "embedding"})),
    Row("lora_dropout", partial(LoraConfig, r=4, lora_dropout=0.5), kinds=ALL - WEIGHTS),
    Row("lora_bias", partial(LoraConfig, r=4, lora_bias=True), kinds=ALL - WEIGHTS - {"embedding"}),
    Row(
        "lora_odd_rank", partial(LoraConfig, r=3), tested=frozenset({"linear", *CONV}), merges=ALL - {"conv2d_grouped"}
    ),
]
