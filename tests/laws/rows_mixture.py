"""Rows of the routed mixtures."""

from __future__ import annotations

from functools import partial

from laws.kinds import LINEAR
from laws.table import Row
from veneer import LilyConfig, LoraMoeConfig, MixLoraConfig, MolaConfig, MoleConfig, PolyConfig

ROWS = [
    Row("mola", partial(MolaConfig, r=4, experts=3, top_k=2), kinds=LINEAR, merges=False),
    Row(
        "mola_dense",
        partial(MolaConfig, r=4, experts=2, top_k=2),
        kinds=LINEAR,
        tested=frozenset({"linear"}),
        merges=False,
    ),
    Row("loramoe", partial(LoraMoeConfig, r=4, experts=4, knowledge_experts=2), kinds=LINEAR, merges=False),
    Row(  # at plain layers it is LoRA, which has a row of its own
        "mixlora",
        partial(MixLoraConfig, r=4, experts=3, top_k=2),
        kinds=frozenset({"feed_forward"}),
        tested=frozenset({"feed_forward"}),
        merges=False,
    ),
    Row("mole", partial(MoleConfig, r=4, experts=["a", "b"]), kinds=LINEAR, merges=False, zero_start=False),
    Row("poly", partial(PolyConfig, r=4, n_skills=3), kinds=LINEAR),
    Row("mhr", partial(PolyConfig, r=4, n_skills=2, n_splits=2), kinds=LINEAR, tested=frozenset({"linear"})),
    Row("lily", partial(LilyConfig, r=4), kinds=LINEAR, merges=False),
]
