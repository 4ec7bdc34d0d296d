"""Algebra of adapters: weighted sums and their kin, defined on the deltas, planted as one plain LoRA adapter.

With deltas D_i (for LoRA s_i B_i A_i) and weights w_i:

    cat, linear, svd        sum_i w_i D_i: with factors side by side; at the least rank that holds it; at a chosen rank
    magnitude_prune         sum_i w_i top(D_i)           dare_linear    sum_i w_i drop(D_i)
    ties                    mean over agreeing signs of w_i top(D_i)       dare_ties   the same of w_i drop(D_i)
    ..._svd                 the element-wise ones at rank max r_i instead of sum r_i
    ..._factors             PEFT's rule on A and B apart (with cross terms), for equal results where they are wanted

Sums of low-rank deltas never form the full matrix: QR of the stacked factors and an SVD of the small core. What has no
factors (LoHa, a DoRA member, an element-wise rule) is factored once, layer by layer. The result has alpha = r, so its
factors hold all scales. Any additive method may be a member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.core.adapter import Additive, Stacked
from veneer.engine.adapted import Adapted
from veneer.engine.as_lora import Combined, Delta, additive, copy_companions, delta_of, is_own, label, plant
from veneer.engine.tuner import Tuner
from veneer.ops import combining as ops
from veneer.ops.combining import Pair


@dataclass
class Options:
    """How to combine: rank of the result, share of entries kept, how signs are elected, where chance comes from."""

    rank: int | float | None
    clamp: float | None
    density: float | None
    by: str
    generator: torch.Generator


Rule = Callable[[list[Delta], Options], tuple[Pair, float]]


# ---- the rules ------------------------------------------------------------------------------------------------------
def _sum(deltas: list[Delta]) -> Pair:
    return ops.stacked([d.pair for d in deltas], [d.weight for d in deltas])


def _best_sum(deltas: list[Delta], rank: int | float) -> tuple[Pair, float]:
    if all(d.own is not None for d in deltas):
        return ops.compressed(_sum(deltas), rank)
    return ops.factored(ops.weighted([d.matrix for d in deltas], [d.weight for d in deltas]), rank)


def _total_rank(deltas: list[Delta]) -> int:
    return min(sum(d.rank for d in deltas), *deltas[0].limits)


def _cat(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
    return _sum(deltas), 0.0


def _linear(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
    rank = options.rank or _total_rank(deltas)
    if rank == sum(d.rank for d in deltas) and all(d.own is not None for d in deltas):
        return _sum(deltas), 0.0  # side by side they have it
    return _best_sum(deltas, rank)


def _svd(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
    pair, lost = _best_sum(deltas, options.rank or max(d.rank for d in deltas))
    return (pair if options.clamp is None else ops.clamped(pair, options.clamp)), lost


def _kept(tensors: list[Tensor], how: str, options: Options) -> list[Tensor]:
    assert options.density is not None
    if how.startswith("dare"):
        return [ops.dropped(t, options.density, options.generator) for t in tensors]
    return [ops.largest(t, options.density) for t in tensors]


def _on_entries(how: str, truncated: bool) -> Rule:
    """``how`` on the full deltas; a negative weight turns its delta round before signs are elected."""

    def rule(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
        kept = _kept([d.matrix for d in deltas], how, options)
        weights = [d.weight for d in deltas]
        if how.endswith("ties"):
            turned = [-t if w < 0 else t for t, w in zip(kept, weights, strict=True)]
            matrix = ops.elected(turned, [abs(w) for w in weights], options.by)
        else:
            matrix = ops.weighted(kept, weights)
        rank = options.rank or (max(d.rank for d in deltas) if truncated else _total_rank(deltas))
        pair, lost = ops.factored(matrix, rank)
        return (pair if options.clamp is None else ops.clamped(pair, options.clamp)), lost

    return rule


def _on_factors(how: str) -> Rule:
    """PEFT's rule: each factor for itself, scaled by sqrt(|w s|), the sign of w on A."""

    def rule(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
        members = [d.plain for d in deltas]
        if None in members or len({d.rank for d in deltas}) > 1:
            raise ValueError(
                f"combination_type='{how}_factors' needs members that are plain LoRA adapters of one rank; use "
                f"'{how}', which works on the deltas."
            )
        roots = [abs(d.weight * d.plain[2]) ** 0.5 for d in deltas]  # type: ignore[index]
        signs = [-1.0 if d.weight < 0 else 1.0 for d in deltas]
        both = []
        for which, weights in enumerate(([g * r for g, r in zip(signs, roots, strict=True)], roots)):
            tensors = [m[which] for m in members]  # type: ignore[index]
            if how != "linear":
                tensors = _kept(tensors, how, options)
            both.append(
                ops.elected(tensors, weights, options.by) if how.endswith("ties") else ops.weighted(tensors, weights)
            )
        return (both[1], both[0]), 0.0

    return rule


ENTRYWISE = ("magnitude_prune", "ties", "dare_linear", "dare_ties")
RULES: dict[str, Rule] = {"cat": _cat, "linear": _linear, "svd": _svd}
RULES |= {name: _on_entries(name, truncated=False) for name in ENTRYWISE}
RULES |= {f"{name}_svd": _on_entries(name, truncated=True) for name in ENTRYWISE}
RULES |= {f"{name}_factors": _on_factors(name) for name in ("linear", *ENTRYWISE)}


# ---- the call -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def add_weighted_adapter(
    tuner: Tuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> dict[str, float]:
    """Add the adapter ``name``: a plain LoRA that combines others. It is not made active.

    Args:
        tuner: the tuner that holds the members.
        adapters: the members' names.
        weights: a factor for each; negative ones subtract.
        name: the new adapter's name.
        combination_type: a key of ``RULES``; see the module.
        svd_rank: rank of the result, where it is not the rule's own.
        svd_clamp: quantile that limits the entries of the result's factors.
        density: share of entries that pruning and dropping keep, in (0, 1].
        majority_sign_method: "total" or "frequency".
        seed: of the random drops.

    Returns:
        layer -> the relative error that the result's rank costs there (0 where it is exact).

    Raises:
        ValueError: an unknown name or type, a name that is taken, a missing density, or members that have no sum.
    """
    rule = _checked(tuner, adapters, weights, name, combination_type, density, majority_sign_method)
    generator = torch.Generator().manual_seed(seed)
    options = Options(svd_rank, svd_clamp, density, majority_sign_method, generator)
    with tuner.disabled():  # the original weights are in place, whatever is merged or stands in for them
        combined = combine(tuner, dict(zip(adapters, weights, strict=True)), rule, options)
        plant(tuner, name, list(adapters), combined)
        copy_companions(tuner, name, dict(zip(adapters, weights, strict=True)))
    return {label(host.site): one.lost for host, one in combined.items()}


def _checked(
    tuner: Tuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    kind: str,
    density: float | None,
    by: str,
) -> Rule:
    tuner._require(*adapters)
    tuner._check_name(name)
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ValueError(
            f"Give one weight for each of at least one distinct adapter, not {len(weights)} for {list(adapters)}."
        )
    if kind not in RULES:
        raise ValueError(f"Invalid combination_type: '{kind}' is unknown; known are {', '.join(RULES)}.")
    if any(kind.startswith(entrywise) for entrywise in ENTRYWISE) and (density is None or not 0 < density <= 1):
        raise ValueError(f"combination_type='{kind}' needs a density in (0, 1], not {density}.")
    if tuner.merged:
        raise ValueError(f"Adapters are merged ({', '.join(tuner.merged)}); unmerge before combining.")
    if by not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', not '{by}'.")
    for member in adapters:
        if member in tuner.prompts:
            raise ValueError(f"'{member}' is a prompt, which has no delta to combine.")
    for option in ("modules_to_save", "trainable_token_indices"):
        holders = [m for m in adapters if getattr(tuner.configs[m], option, None)]
        if len(holders) > 1:
            raise ValueError(
                f"The adapters {' and '.join(holders)} each hold {option}, of which there is no sum; combine adapters "
                "of which at most one does."
            )
    return RULES[kind]


def combine(tuner: Tuner, members: dict[str, float], rule: Rule, options: Options) -> dict[Adapted, Combined]:
    """What ``rule`` makes of the members at each of their sites.

    Raises:
        ValueError: a member whose effect is no delta.
    """
    at: dict[Adapted, list[tuple[Additive | Stacked, float]]] = {}
    for member, weight in members.items():
        for host in tuner.hosts(member):
            if is_own(tuner, member, host.adapters[member]):
                at.setdefault(host, []).append((additive(member, host.adapters[member]), float(weight)))
    out = {}
    for host, here in at.items():
        pair, lost = rule([delta_of(adapter, weight) for adapter, weight in here], options)
        bias: Tensor | None = None
        for adapter, weight in here:
            own = adapter.delta_bias() if isinstance(adapter, Additive) else None
            if own is not None:
                bias = weight * own.float() + (0 if bias is None else bias)
        out[host] = Combined(pair, bias, lost)
    return out
