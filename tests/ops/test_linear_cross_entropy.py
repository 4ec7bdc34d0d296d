"""The loss of a head in chunks equals cross-entropy of its logits, forward and gradient; its memory is the hidden's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veneer.ops.linear_cross_entropy import IGNORED, LEAST, linear_cross_entropy, logits_of, token_log_probs


def tensors(dtype=torch.float64, n=11, d=6, v=13):
    torch.manual_seed(0)
    hidden = torch.randn(2, n, d, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, v, (2, n))
    labels[0, :4] = labels[1, 7] = IGNORED
    return hidden, torch.randn(v, d, dtype=dtype), labels, torch.randn(v, dtype=dtype)


SETTINGS = [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 2.0}, {"chunk": 1}, {"chunk": 100}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradient_equal_cross_entropy_of_the_logits(settings: dict, with_bias: bool) -> None:
    hidden, weight, labels, bias = tensors()
    bias = bias if with_bias else None
    settings = {"chunk": 4} | settings
    loss = linear_cross_entropy(hidden, weight, labels, bias, **settings)
    logits = logits_of(hidden, weight, bias, settings.get("scale", 1.0), settings.get("softcap"))
    twin = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    assert torch.allclose(loss, twin)
    ours, theirs = torch.autograd.grad(2 * loss, hidden), torch.autograd.grad(2 * twin, hidden)
    assert torch.allclose(ours[0], theirs[0])
    assert torch.autograd.gradcheck(lambda h: token_log_probs(h, weight, labels, bias, **settings), hidden)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, weight, labels, bias, **settings), twin)


def test_log_probabilities_are_those_of_the_labels_and_zero_where_ignored() -> None:
    hidden, weight, labels, _ = tensors()
    found = token_log_probs(hidden, weight, labels)
    exact = F.linear(hidden, weight).log_softmax(-1)
    wanted = torch.where(labels == IGNORED, 0, exact.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1))
    assert torch.allclose(found, wanted)
    weights = torch.rand_like(found)
    ours, twin = (torch.autograd.grad((weights * f).sum(), hidden)[0] for f in (found, wanted))
    assert torch.allclose(ours, twin)


def test_nothing_to_learn_is_no_loss_and_no_gradient() -> None:
    hidden, weight, labels, _ = tensors()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


def test_half_precision_is_as_near_as_the_logits_are() -> None:
    hidden, weight, labels, _ = tensors(torch.float32, n=64, d=32, v=100)
    half = hidden.detach().bfloat16().requires_grad_()
    loss = linear_cross_entropy(half, weight.bfloat16(), labels)
    twin = linear_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32 and abs(loss - twin) < 0.01 * twin
    loss.backward(), twin.backward()
    assert (half.grad - hidden.grad).norm() < 0.02 * hidden.grad.norm()


class _Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_the_logits_of_the_batch_never_exist() -> None:
    hidden, weight, labels, _ = tensors(torch.float32, n=512, d=16, v=200)
    with _Largest() as seen:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert seen.numbers <= max(hidden.numel(), LEAST * len(weight)) < labels.numel() * len(weight) / 3


def test_a_head_that_trains_is_refused() -> None:
    hidden, weight, labels, _ = tensors()
    with pytest.raises(ValueError, match="cross_entropy"):
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)
