"""The peer's functions on lists of task tensors: ``peft.utils.merge_utils``. Our own sums are in ``ops.combining``.

TIES: Yadav et al., 2023, arXiv:2306.01708. DARE: Yu et al., 2023, arXiv:2311.03099.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from veneer.ops.combining import largest

Election = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """``weights`` (tasks,) with as many dimensions as the stacked task tensors."""
    return weights.view(-1, *[1] * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Keep the share ``density`` of the entries that is largest in size; the rest become 0."""
    return largest(tensor, density)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Keep each entry with probability ``density``; with ``rescale``, divided by it."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """Set all but the share ``density`` of the entries to 0, chosen by size or at random.

    Raises:
        ValueError: a negative density, or an unknown method.
    """
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=2
        )
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    raise ValueError(f"Unknown method {method}; known are magnitude and random.")


def calculate_majority_sign_mask(tensor: Tensor, method: Election = "total") -> Tensor:
    """Where entries of the stacked tasks (tasks, ...) have the sign that most have, by sum or by count.

    Raises:
        RuntimeError: another method.
    """
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"; known are total and frequency.')
    sign = tensor.sign()
    chosen = torch.where((tensor if method == "total" else sign).sum(0) >= 0, 1, -1)
    return sign == chosen


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean over the tasks whose entry is marked."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    return _weighted(task_tensors, weights).sum(0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what pruning by size leaves."""
    return task_arithmetic([prune(t, density, "magnitude") for t in task_tensors], weights)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what random pruning leaves, rescaled."""
    return task_arithmetic([prune(t, density, "random", rescale=True) for t in task_tensors], weights)


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Election = "total"
) -> Tensor:
    """Prune by size, elect a sign, average what agrees with it."""
    return _elected([prune(t, density, "magnitude") for t in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Election = "total"
) -> Tensor:
    """Prune at random and rescale, elect a sign, average what agrees with it."""
    return _elected([prune(t, density, "random", rescale=True) for t in task_tensors], weights, majority_sign_method)


def _weighted(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    tasks = torch.stack(list(task_tensors))
    return tasks * reshape_weight_task_tensors(tasks, weights)


def _elected(task_tensors: Sequence[Tensor], weights: Tensor, method: Election) -> Tensor:
    mask = calculate_majority_sign_mask(torch.stack(list(task_tensors)), method)
    return disjoint_merge(_weighted(task_tensors, weights), mask)
