"""Rows of the routed mixtures."""

from __future__ import annotations

from functools import partial

from laws.kinds import LINEAR
from laws.table import Row
from veneer import MolaConfig

ROWS = [
    Row("mola", partial(MolaConfig, r=4, experts=3, top_k=2), kinds=LINEAR, merges=False),
    Row(
        "mola_dense",
        partial(MolaConfig, r=4, experts=2, top_k=2),
        kinds=LINEAR,
        tested=frozenset({"linear"}),
        merges=False,
    ),
]
