"""LoRA on tensor-parallel layers: A and B are cut up as the layer is, so that each process computes its own part.

    column    y_p = x W_p^T + s (x A^T) B_p^T           A whole, B cut along out
    row       y = sum_p x_p W_p^T + s (sum_p x_p A_p^T) B^T    A cut along in, B whole

One all-reduce of rank numbers a token: of the gradient of x A^T for a column layer, of x A^T itself for a row layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Base
from veneer.core.parallel import only
from veneer.core.parts import is_cut
from veneer.core.sites import Site
from veneer.methods.lora import Lora
from veneer.methods.lora_config import KINDS, LoraConfig


class _Divided(Lora):
    """What LoRA on layers that are cut up has in common."""

    def __init__(self, site: Site, config: LoraConfig):
        unfit = {
            "lora_dropout": config.lora_dropout,
            "lora_bias": config.lora_bias,
            f"init_lora_weights={config.init_lora_weights!r}": config.init_lora_weights
            not in (True, False, "gaussian"),
        }
        for option, there in unfit.items():
            if there:
                raise ValueError(
                    f"{option} does not work at '{site.path}', whose weight is cut up between processes (tensor "
                    "parallelism); leave it out."
                )
        super().__init__(site, config)


class LoraParallel(_Divided):
    """LoRA whose factors are DTensors, beside a layer whose weight is one."""

    def ready(self) -> None:
        """Cut up A and B; process 0's values count."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        weight = self.site.stored
        ways = {"column": (Replicate(), Shard(0)), "row": (Shard(1), Replicate()), "whole": (Replicate(), Replicate())}
        for factor, way in zip((self.lora_A, self.lora_B), ways[self.site.direction], strict=True):
            if not is_cut(factor.weight):
                cut = distribute_tensor(factor.weight.detach(), weight.device_mesh, (way,))  # type: ignore[attr-defined]
                factor.weight = nn.Parameter(cut, factor.weight.requires_grad)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        change = self.scaling * self._change(x.to(self.dtype))
        return y + self._laid(change, y).to(y.dtype)

    def _change(self, x: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh, whole = self.lora_A.weight.device_mesh, self.site.in_features
        if not is_cut(x):
            parts = Shard(x.dim() - 1) if x.shape[-1] != whole else Replicate()
            x = DTensor.from_local(x, mesh, (parts,), run_check=False)
        h = F.linear(x, self.lora_A.weight).redistribute(placements=(Replicate(),))
        return F.linear(h, self.lora_B.weight)

    def _laid(self, change: Any, y: Tensor) -> Tensor:
        """The change as the layer's output lies: whole, or this process' part."""
        from torch.distributed.tensor import Replicate, Shard

        if is_cut(y):
            return change.redistribute(placements=y.placements)  # type: ignore[attr-defined]
        way = Replicate() if y.shape[-1] == self.site.out_features else Shard(y.dim() - 1)
        local = change.redistribute(placements=(way,)).to_local()
        if local.shape != y.shape:
            raise ValueError(
                f"'{self.site.path}' gives {tuple(y.shape)} on this process, and LoRA's part is {tuple(local.shape)}: "
                "its plan cuts up the sequence, which adapters do not follow; use a plan that keeps sequences whole."
            )
        return local

    def merged(self, weight: Tensor, bias: Tensor | None) -> Any:
        """Refuse: the sum would have to be gathered."""
        raise ValueError(
            f"'{self.site.path}' is cut up between processes; save the adapter and merge it in one process."
        )


class LoraMegatron(_Divided):
    """LoRA beside one of Megatron's parallel layers, with factors of that very class."""

    def make_factors(self, site: Site, config: LoraConfig) -> None:
        self.lora_A, self.lora_B = site.factors(config.r)

    def ready(self) -> None:
        """The factor that is whole starts alike on every process."""
        factor = self.lora_A if self.site.direction == "column" else self.lora_B
        group = getattr(self.site.module, "tp_group", None)
        if group is not None and torch.distributed.is_initialized() and factor.weight.device.type != "meta":
            first = torch.distributed.get_global_rank(group, 0)
            torch.distributed.broadcast(factor.weight.data, first, group=group)

    def forward(self, x: Tensor, base: Base) -> Any:
        out = base(x)
        y = only(out) + (self.scaling * only(self.lora_B(only(self.lora_A(x.to(self.dtype)))))).to(only(out).dtype)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def merged(self, weight: Tensor, bias: Tensor | None) -> Any:
        """Refuse: the parts of the weight lie in Megatron's own layers."""
        raise ValueError(f"'{self.site.path}' is one of Megatron's parallel layers; merge in one process, without it.")


KINDS["parallel"], KINDS["megatron"] = LoraParallel, LoraMegatron
