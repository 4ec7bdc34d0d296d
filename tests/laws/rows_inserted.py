"""Rows of what is inserted around whole modules."""

from __future__ import annotations

from functools import partial

from laws.table import Row
from veneer import BottleneckConfig, CompacterConfig, ReftConfig

WHOLE = {"kinds": frozenset({"block", "linear"}), "tested": frozenset({"block", "linear"}), "merges": False}

ROWS = [
    Row("bottleneck", partial(BottleneckConfig, bottleneck_size=4), **WHOLE),
    Row(
        "bottleneck_parallel",
        partial(BottleneckConfig, placement="parallel", reduction_factor=2, scaling="learned"),
        **WHOLE,
    ),
    Row("compacter", partial(CompacterConfig, reduction_factor=2), **WHOLE),
    Row("loreft", partial(ReftConfig, r=2, positions="f1+l1"), **WHOLE),
    Row("direft_untied", partial(ReftConfig, r=2, positions="f1+l1", variant="direft", tied=False), **WHOLE),
]
