"""Cross-entropy of a linear layer's logits, a chunk of tokens at a time, so that the logits of a batch never exist.

    loss = sum over tokens t of -log softmax(logits_t)[label_t]        logits_t = cap tanh((scale h_t W^T + b) / cap)

The gradient with respect to h is formed in the forward pass, chunk by chunk while its logits are there, and is all that
is kept for the backward pass: N d numbers in place of N V (and no second product with W). Chunks hold about as many
logits as h has entries. After Liger's fused linear cross-entropy (Hsu et al., 2024, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
LEAST = 256
"""Tokens in a chunk, at least: thinner products are slow."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **settings: Any
) -> Tensor:
    """The sum of the tokens' losses, in float32 (float64 for float64 input): minus ``token_log_probs``, summed.

    Returns:
        (), to be divided by the number of learnt tokens.
    """
    return -token_log_probs(hidden, weight, labels, bias, **settings).sum()


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = IGNORED,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Each label's log-probability (for preference losses too), in float32 (float64 for float64 input).

    Args:
        hidden: (..., d), what the head reads; place t must stand for the token that ``labels`` has at t (shift before).
        weight: (V, d), the head's, frozen.
        labels: (...), token ids; ``ignore_index`` where there is nothing to learn.
        bias: (V,) or None, frozen.
        ignore_index: see ``labels``.
        scale: multiplies the product.
        softcap: bounds the logits (Gemma), or None.
        chunk: tokens at a time; default: so that a chunk's logits are about as many numbers as ``hidden``.

    Returns:
        (...), 0 where a label is ignored.

    Raises:
        ValueError: the head's weight or bias trains.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "A head taken in chunks gets no gradient, but this one trains; compute its logits, and use "
            "torch.nn.functional.cross_entropy."
        )
    return _LogProbs.apply(hidden, weight, labels, bias, ignore_index, scale, softcap, chunk)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """(n, V): the eager head."""
    logits = F.linear(hidden, weight, bias) * scale if scale != 1 else F.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignored: int, scale: float,
    softcap: float | None, chunk: int | None, needs_grad: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:  # fmt: skip
    """(places, log-probabilities, their gradients d log p / d hidden) of the learnt tokens, a chunk at a time."""
    places = (labels != ignored).nonzero().squeeze(1)
    chunk = chunk or max(LEAST, hidden.numel() // weight.shape[0])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for own in places.split(chunk):
        h, at = hidden.index_select(0, own), labels.index_select(0, own)[:, None]
        raw = F.linear(h, weight, bias).to(wide)
        if scale != 1:
            raw.mul_(scale)
        bent = None if softcap is None else raw.div_(softcap).tanh_()
        logits = raw if bent is None else softcap * bent
        p = logits.log_softmax(-1)
        log_p = p.gather(1, at).squeeze(1)
        if not needs_grad:
            yield own, log_p, None
            continue
        d = p.exp_().neg_()  # d log p_label / d logits = [v is the label] - p_v
        d.scatter_add_(1, at, torch.ones_like(at, dtype=wide))
        if bent is not None:
            d.mul_(1 - bent.square_())
        if scale != 1:
            d.mul_(scale)
        yield own, log_p, d.to(hidden.dtype) @ weight


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        flat, needs = hidden.reshape(-1, hidden.shape[-1]), ctx.needs_input_grad[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out = torch.zeros(len(flat), dtype=wide, device=hidden.device)
        grad = torch.zeros_like(flat) if needs else None
        for own, log_p, d in _chunks(flat, weight, labels.reshape(-1), bias, *rest, needs):  # type: ignore[call-arg]
            out[own] = log_p
            if grad is not None and d is not None:
                grad[own] = d
        ctx.shape = hidden.shape
        ctx.save_for_backward(grad)
        return out.view(labels.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        dh = None if grad is None else (grad * g.reshape(-1, 1).to(grad.dtype)).view(ctx.shape)
        return dh, *[None] * 7
