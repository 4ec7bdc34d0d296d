"""Linear layers that are cut up between processes which work on the same rows: tensor parallelism.

    column    W = [W_0; W_1; ...]  (out cut)    x whole on every process     y_p = x W_p^T, a part of the output
    row       W = [W_0, W_1, ...]  (in cut)     x_p a part of the input      y = sum_p x_p W_p^T, whole on every process

torch keeps such weights as DTensors (``parallelize_module``, transformers' ``tp_plan``), Megatron as its own layers,
whose classes announce themselves here when they are asked for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.core import sites
from veneer.core.parts import is_cut
from veneer.core.sites import LinearSite, Site

MEGATRON: dict[type, str] = {}
"""Megatron's classes of parallel layers -> "column" or "row"."""


class ParallelSite(LinearSite):
    """A linear layer whose weight is a DTensor.

    Raises:
        ValueError: it is cut up in more than one direction.
    """

    kind = "parallel"
    cut = True

    def __init__(self, path: str, module: Any):
        super().__init__(path, module)
        placements = self.stored.placements  # type: ignore[attr-defined]
        if len(placements) != 1:
            raise ValueError(
                f"The weight of '{path}' is cut up over a mesh of {len(placements)} dimensions; adapters sit on tensor "
                "parallel layers of one dimension. Add the adapter before sharding by FSDP."
            )
        at = placements[0].dim % 2 if placements[0].is_shard() else None
        self.direction = {0: "column", 1: "row", None: "whole"}[at]


class MegatronSite(Site):
    """One of Megatron's parallel layers, which return (output, bias)."""

    kind = "megatron"
    cut = True
    first = "input_"

    def __init__(self, path: str, module: Any, direction: str):
        super().__init__(path, module)
        self.in_features, self.out_features, self.direction = module.input_size, module.output_size, direction

    def factors(self, rank: int) -> tuple[nn.Module, nn.Module]:
        """Of a column layer B is cut as it is, of a row layer A; the other one is whole on every process."""
        like: Any = type(self.module)
        own = {"config": self.module.config, "init_method": nn.init.zeros_, "bias": False, "skip_bias_add": True}
        if self.direction == "column":
            up = like(rank, self.out_features, gather_output=self.module.gather_output, **own)
            return nn.Linear(self.in_features, rank, bias=False), up
        down = like(self.in_features, rank, input_is_parallel=self.module.input_is_parallel, **own)
        return down, nn.Linear(rank, self.out_features, bias=False)


def recognise(path: str, module: nn.Module) -> list[Site]:
    """The site of a parallel layer; nothing for any other module."""
    direction = MEGATRON.get(type(module))
    if direction is not None:
        return [MegatronSite(path, module, direction)]
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and is_cut(weight):
        return [ParallelSite(path, module)]
    return []


def only(output: Any) -> Tensor:
    """The output of a layer that may return its bias beside it."""
    return output[0] if isinstance(output, tuple) else output


sites.RECOGNISED.append(recognise)
