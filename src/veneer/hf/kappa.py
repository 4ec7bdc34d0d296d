"""KappaTune (2025, arXiv:2506.16289): adapt the layers whose weights have the smallest condition numbers.

    kappa(W) = S_max / S_min

A small kappa means that the weight uses all its directions alike, so that a change there disturbs least what the model
knows. Cost: the eigenvalues of the smaller Gram matrix of every weight, in float64.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from tqdm import tqdm

from veneer.core.sites import LinearSite, sites_for

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""What the names of fused expert parameters end in."""


def condition_number(w: Tensor) -> float:
    """S_max / S_min of a matrix; of a stack (experts, out, in), the mean over its matrices."""
    if w.dim() == 3:
        return sum(condition_number(m) for m in w) / len(w)
    m = w.detach().double()
    gram = m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m
    values = torch.linalg.eigvalsh(gram)
    return float((values[-1] / values[0].clamp_min(1e-300)).sqrt()) if values[0] > 0 else float("inf")


class KappaTuneSelector:
    """Condition numbers of a model's linear layers and fused experts, and the names with the smallest ones.

    Args:
        model: the base model, not adapted yet.
        max_dim_size_to_analyze: larger matrices are passed over.
        moe_param_suffixes: what the names of fused experts end in.
        show_progress: a bar over the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model, self.most, self.show = model, max_dim_size_to_analyze, show_progress
        self.suffixes = tuple(moe_param_suffixes or EXPERTS)

    @functools.cached_property
    def modules(self) -> dict[str, float]:
        """Path of a linear layer -> its condition number."""
        found = {}
        for path, module in tqdm(list(self.model.named_modules()), desc="kappa", disable=not self.show):
            for site in sites_for(path, module) if path else ():
                if isinstance(site, LinearSite) and max(site.shape) <= self.most:
                    found[path] = condition_number(site.weight)
        return found

    @functools.cached_property
    def parameters(self) -> dict[str, float]:
        """Path of a stack of experts -> the mean of its condition numbers."""
        return {
            path: condition_number(p)
            for path, p in tqdm(list(self.model.named_parameters()), desc="kappa", disable=not self.show)
            if p.dim() == 3 and max(p.shape[1:]) <= self.most and f".{path}".endswith(self.suffixes)
        }

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Linear layers, smallest condition number first: a share, a number, or all up to a threshold."""
        return _best(self.modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Stacks of experts, likewise."""
        return _best(self.parameters, top_p, num_modules, threshold)


def _best(kappas: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    if sum(x is not None for x in (top_p, count, threshold)) > 1:
        raise ValueError("Give one of top_p, num_modules and threshold, not several.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}.")
    names = sorted(kappas, key=lambda name: kappas[name])
    if threshold is not None:
        return [name for name in names if kappas[name] <= threshold]
    if count is None:
        count = len(names) if top_p is None else max(1, int(len(names) * top_p))
    return names[:count]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """``{"target_modules": ..., "target_parameters": ...}`` for a config: the share of layers with the smallest kappa.

    Args:
        model: the base model.
        top_p: the share, in (0, 1].
        max_dim_size_to_analyze, moe_param_suffixes, show_progress: see ``KappaTuneSelector``.

    Raises:
        ValueError: a bad share.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p) or None,
        "target_parameters": selector.get_best_target_parameters(top_p) or None,
    }
