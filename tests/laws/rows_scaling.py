"""Rows of the methods that scale, shift or reweight, and of small additive ones."""

from __future__ import annotations

from functools import partial
from typing import Any

from laws.kinds import ALL, CONV, LINEAR, WEIGHTS
from laws.table import Row
from veneer import (
    BeftConfig,
    BitFitConfig,
    DeftConfig,
    DeloraConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    MissConfig,
    PsoftConfig,
)

NO_BIAS_YET = ("glora_D.X",)
"""Attention's biases start at zero, and D scales them."""
PLAIN = frozenset({"linear", "conv2d"})
SOME = frozenset({"linear", "conv2d", "embedding", "experts"})


def fed(**targets: Any) -> IA3Config:
    """(IA)^3 on the input side of every target."""
    return IA3Config(feedforward_modules=".*", **targets)


ROWS = [
    Row("ia3", IA3Config),
    Row("ia3_feedforward", fed),
    Row("bitfit", BitFitConfig, kinds=ALL - {"linear_no_bias", "embedding", "experts", "parameter"}, combines=False),
    Row("beft", BeftConfig, kinds=ALL - {"experts", "parameter"}),
    Row("ln_tuning", LNTuningConfig, kinds=ALL - {"experts", "parameter"}, combines=False),
    Row("hira", partial(HiraConfig, r=4)),
    Row("hira_dropout", partial(HiraConfig, r=4, hira_dropout=0.5), kinds=ALL - WEIGHTS),
    Row("glora", partial(GloraConfig, r=4), gradient_free=NO_BIAS_YET),
    Row("glora_vector", partial(GloraConfig, config_A_B="vector", config_C="vector", config_D_E="vector"), tested=SOME),
    Row("glora_constant", partial(GloraConfig, config_A_B="constant", config_C="none"), tested=SOME),
    Row(
        "glora_bias_only",
        partial(GloraConfig, config_A_B="none"),
        kinds=LINEAR - {"linear_no_bias"} | CONV | {"mha"},
        gradient_free=NO_BIAS_YET,
    ),
    Row("deft", partial(DeftConfig, r=4), start_tolerance=1e-5),
    Row("deft_qr", partial(DeftConfig, r=4, decomposition_method="qr", alpha=8), tested=SOME, start_tolerance=1e-5),
    Row("para", partial(DeftConfig, r=4, para=True), tested=SOME, zero_start=False),
    Row("deft_dropout", partial(DeftConfig, r=4, deft_dropout=0.5), tested=PLAIN, start_tolerance=1e-5),
    Row("miss", partial(MissConfig, r=3)),
    Row("miss_bat", partial(MissConfig, r=2, init_weights="bat")),
    Row("miss_mini", partial(MissConfig, r=4, mini_r=2, init_weights="mini")),
    Row("miss_dropout", partial(MissConfig, r=3, miss_dropout=0.5), tested=PLAIN),
    Row("delora", partial(DeloraConfig, r=4)),
    Row("gralora", partial(GraloraConfig, r=4)),
    Row("gralora_hybrid", partial(GraloraConfig, r=4, hybrid_r=2), tested=SOME),
    Row("gralora_dropout", partial(GraloraConfig, r=4, gralora_dropout=0.5), kinds=ALL - WEIGHTS),
    Row("psoft_dropout", partial(PsoftConfig, r=4, psoft_dropout=0.5), kinds=ALL - WEIGHTS),
    Row("delora_dropout", partial(DeloraConfig, r=4, module_dropout=0.5), kinds=ALL - WEIGHTS),
]  # fmt: skip
