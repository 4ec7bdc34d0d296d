"""LoRA's starts: those that read or split the weight. (Those that read data are plain LoRA until they have read it.)"""

from __future__ import annotations

from functools import partial

from laws.table import Row
from veneer import LoraConfig
from veneer.methods.lora_options import LoftQConfig

CLOSE = 4e-6
"""Where the weight was split, it is put together again in float32."""
SOME = frozenset({"linear", "conv1d_hf", "conv2d_grouped", "embedding", "mha", "experts"})


def lora(init: str, **options):
    return partial(LoraConfig, r=4, lora_alpha=6, init_lora_weights=init, **options)


ROWS = [
    Row("pissa", lora("pissa"), start_tolerance=CLOSE),
    Row("pissa_niter", lora("pissa_niter_2", use_rslora=True), tested=SOME, start_tolerance=CLOSE),
    Row("pissa_dora", lora("pissa", use_dora=True), tested=SOME, start_tolerance=CLOSE),
    Row("olora", lora("olora"), start_tolerance=CLOSE),
    Row("milora", lora("milora"), tested=SOME, start_tolerance=CLOSE),
    Row("mica", lora("mica"), tested=SOME),
    Row("orthogonal", lora("orthogonal"), tested=SOME),
    *(Row(name, lora(name), tested=frozenset({"linear", "experts"})) for name in ("eva", "corda", "lora_ga")),
    Row("loftq", lora("loftq", loftq_config=LoftQConfig(loftq_bits=8, loftq_iter=2)), tested=SOME, zero_start=False),
]
