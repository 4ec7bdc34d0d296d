"""Rows of LoRA's variants and of AdaLoRA."""

from __future__ import annotations

from functools import partial

from laws.kinds import ALL, CONV, LINEAR, WEIGHTS
from laws.table import Row
from veneer import AdaLoraConfig, BdLoraConfig, KasaConfig, LoraConfig, MontecloraConfig, VeloraConfig

ADALORA = partial(AdaLoraConfig, init_r=4, target_r=2, total_step=100)

ROWS = [
    Row("dora", partial(LoraConfig, r=4, use_dora=True)),
    Row("dora_rslora_gaussian", partial(LoraConfig, r=4, use_dora=True, use_rslora=True, init_lora_weights="gaussian"),
        tested=frozenset({"linear", "conv2d", "embedding"})),
    Row("adalora", ADALORA),
    Row("adalora_dropout", partial(ADALORA, lora_dropout=0.5), kinds=ALL - WEIGHTS),
    Row("dora_dropout", partial(LoraConfig, r=4, use_dora=True, lora_dropout=0.5), kinds=ALL - WEIGHTS),
    Row("kasa", partial(LoraConfig, r=4, kasa_config=KasaConfig()), zero_start=False),
    Row("bdlora_a", partial(LoraConfig, r=4, use_bdlora=BdLoraConfig(["layer"], nblocks=2)), kinds=LINEAR),
    Row("bdlora_b", partial(LoraConfig, r=4, use_bdlora=BdLoraConfig(None, ["layer"], nblocks=2)), kinds=LINEAR),
    Row("qalora", partial(LoraConfig, r=4, use_qalora=True, qalora_group_size=2), kinds=LINEAR | WEIGHTS),
    Row("velora", partial(LoraConfig, r=4, velora_config=VeloraConfig(num_groups=4)), kinds=LINEAR),
    Row("monteclora", partial(LoraConfig, r=4, monteclora_config=MontecloraConfig()),
        kinds=LINEAR | CONV | {"embedding"}, gradient_free=("std_prior", "expert_weights_prior")),
]  # fmt: skip
