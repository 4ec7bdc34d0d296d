"""A language model's head taken out of its forward pass, so that the loss can take the logits a chunk at a time.

The model runs as it is, but its head hands back a short probe instead of logits. What the model made of the probe tells
what it does to its logits (a scale, a soft cap); anything else, and any head that is not one frozen matrix, is left to
the plain way, with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.ops.linear_cross_entropy import token_log_probs


@dataclass(frozen=True)
class Bend:
    """What a model does to its logits: ``cap tanh(scale z / cap)``, or ``scale z``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = self.scale * logits
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


_KNOWN: WeakKeyDictionary[nn.Module, Bend | str] = WeakKeyDictionary()
"""head -> what its model does to the logits, or why that cannot be said."""


def whole(model: nn.Module) -> str | None:
    """Why this model's logits cannot be taken in chunks; None where they can, as far as is known before it has run."""
    head = _head(model)
    if hasattr(model, "_orig_mod"):
        return "the model is compiled"
    if _reads_twice(model):
        return "its mixture runs the model twice"
    if type(head) is not nn.Linear:
        if head is None:
            return "it names no head"
        return "its head is adapted" if getattr(head, "is_adapted", False) else f"its head is a {type(head).__name__}"
    weight, bias = head.weight, head.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "its head trains"
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2 or not weight.numel():
        return "its head's weight is packed or spread over processes"
    if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        return "something hooks its head"
    known = _KNOWN.get(head)
    return known if isinstance(known, str) else None


def label_log_probs(model: nn.Module, labels: Tensor, last: int | None = None, **inputs: Any) -> Tensor | None:
    """log p of each label, without the logits of the batch: None where ``whole(model)`` has a reason.

    Args:
        model: a causal language model, with adapters or without.
        labels: (batch, n), shifted already: n is as many places as the model gives logits for, or as ``last`` says.
        last: take the places ``[-last:-1]`` of what the model gives.
        inputs: the model's own.

    Returns:
        (batch, n), in float32; 0 where a label is -100.
    """
    if whole(model) is not None:
        return None
    head: Any = _head(model)
    probe = _probe(head.weight)
    with _handing(head, probe) as seen:
        answer = model(**inputs).logits
    if head not in _KNOWN:
        _KNOWN[head] = _bend(probe, answer) if len(seen) == 1 else "its head runs more than once"
    bend = _KNOWN[head]
    if isinstance(bend, str):
        return None
    hidden = seen[0] if last is None else seen[0][:, -last:-1]
    return token_log_probs(
        hidden.to(head.weight.dtype), head.weight, labels.to(hidden.device), head.bias, scale=bend.scale,
        softcap=bend.cap,
    )  # fmt: skip


def before_head(model: nn.Module, **inputs: Any) -> Tensor:
    """What the head of a model that is ``whole`` is given, (batch, length, d)."""
    head: Any = _head(model)
    with _handing(head, _probe(head.weight)) as seen:
        model(**inputs)
    return seen[0]


def _head(model: nn.Module) -> nn.Module | None:
    base: Any = model
    while hasattr(base, "module") and not hasattr(base, "get_output_embeddings"):
        base = base.module  # what spreads a model over processes
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def _reads_twice(model: nn.Module) -> bool:
    base: Any = model
    while hasattr(base, "module") and not hasattr(base, "base_model"):
        base = base.module  # what spreads a model over processes
    return bool(getattr(getattr(base, "base_model", None), "roots", None))


@contextlib.contextmanager
def _handing(head: nn.Module, probe: Tensor) -> Iterator[list[Tensor]]:
    """Within, the head keeps what it is given and hands back the probe."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return probe.clone()

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del head.__dict__["forward"]


def _probe(weight: Tensor) -> Tensor:
    """(1, 1, V) logits from very small to very large."""
    probe = torch.linspace(-50, 50, weight.shape[0], device=weight.device)
    probe[0], probe[-1] = 2.0**-16, 2.0**20
    return probe[None, None]


def _bend(probe: Tensor, answer: Tensor) -> Bend | str:
    if answer.shape != probe.shape:
        return "the model does something to its logits that is no scale and no soft cap"
    small, large = answer[0, 0, 0].item() / probe[0, 0, 0].item(), answer[0, 0, -1].item()
    capped = abs(large) < 0.5 * abs(small) * probe[0, 0, -1].item()
    bend = Bend(small, abs(large) if capped else None)
    if not torch.allclose(bend(probe), answer.float(), rtol=1e-4, atol=1e-6):
        return "the model does something to its logits that is no scale and no soft cap"
    return bend
