"""Rows of the methods that rotate: inputs, outputs, or a principal part of the weight."""

from __future__ import annotations

from functools import partial

from laws.kinds import ALL
from laws.table import Row
from veneer import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig, RoadConfig

SOME = frozenset({"linear", "conv2d", "embedding", "experts"})
FULL_RANK = frozenset({"mha", "embedding"})
"""Where the weight has no null direction, so that no reflection leaves the function as it is."""

ROWS = [
    Row("oft", partial(OFTConfig, oft_block_size=4)),
    Row("oft_exact", partial(OFTConfig, oft_block_size=4, use_cayley_neumann=False)),
    Row("oft_shared", partial(OFTConfig, r=2, oft_block_size=0, block_share=True), tested=SOME),
    Row("oft_constrained", partial(OFTConfig, oft_block_size=4, coft=True, eps=0.5), tested=SOME),
    Row("oft_dropout", partial(OFTConfig, oft_block_size=4, module_dropout=0.5), tested=SOME),
    Row("boft", partial(BOFTConfig, boft_block_size=2)),
    Row(
        "boft_butterfly",
        partial(BOFTConfig, boft_block_size=2, boft_n_butterfly_factor=2),
        kinds=ALL - {"experts"},
    ),
    Row("boft_dropout", partial(BOFTConfig, boft_block_size=2, boft_dropout=0.5), tested=SOME),
    Row("hra", partial(HRAConfig, r=4)),
    Row("hra_odd", partial(HRAConfig, r=3), tested=FULL_RANK, zero_start=False),
    Row("hra_gram_schmidt", partial(HRAConfig, r=2, apply_GS=True), tested=FULL_RANK, zero_start=False),
    Row("road", partial(RoadConfig, group_size=2)),
    Row("road_2", partial(RoadConfig, group_size=2, variant="road_2"), tested=SOME),
    Row("road_4", partial(RoadConfig, group_size=2, variant="road_4"), tested=SOME),
    Row("psoft", partial(PsoftConfig, r=4)),
    Row("psoft_pissa", partial(PsoftConfig, r=4, ab_svd_init="pissa_init", use_cayley_neumann=True), tested=SOME),
    Row("psoft_free", partial(PsoftConfig, r=4, psoft_orth=False, psoft_mag_a=False), tested=SOME),
]
