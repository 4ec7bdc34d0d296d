"""Times AdamW with gradient clipping over 448 adapter tensors: torch's in its three forms, and over one flat buffer.

python benchmarks/optimizer.py --hidden 64
python benchmarks/optimizer.py --hidden 512
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import arguments, interleave, report

from veneer import FlatAdamW


def tensors(hidden: int, count: int, rank: int) -> list[torch.nn.Parameter]:
    """A's and B's in turn, with gradients."""
    shapes = [(rank, hidden) if i % 2 == 0 else (hidden, rank) for i in range(count)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def stepping(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A step from gradients that backward has just made, each a tensor of its own."""
    grads = [p.grad for p in params]

    def step() -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        if isinstance(optimizer, FlatAdamW):
            optimizer.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def main() -> None:
    given = arguments(__doc__ or "", hidden=64, tensors=448, rank=8)
    forms = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    candidates = {}
    for name, form in forms.items():
        params = tensors(given.hidden, given.tensors, given.rank)
        candidates[f"torch {name}"] = stepping(params, torch.optim.AdamW(params, lr=1e-4, **form))
    params = tensors(given.hidden, given.tensors, given.rank)
    candidates["veneer flat"] = stepping(params, FlatAdamW(params, lr=1e-4))
    rows = interleave(candidates, 3 * given.rounds)
    report(f"optimizer hidden {given.hidden}: AdamW and clipping, {given.tensors} tensors", rows, "torch default")


if __name__ == "__main__":
    main()
