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

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.adapter import Adapter, Additive, Stacked
from veneer.core.sites import Site
from veneer.engine import targets
from veneer.engine.adapted import Adapted
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


@dataclass
class Delta:
    """One member's effect on one weight, as matrices (..., out, in)."""

    pair: Pair
    weight: float
    dense: Tensor | None = None
    plain: tuple[Tensor, Tensor, float] | None = None
    """(A, B, s) where the member is nothing but s B A."""

    @property
    def rank(self) -> int:
        return self.pair[0].shape[-1]

    @property
    def matrix(self) -> Tensor:
        return self.pair[0] @ self.pair[1] if self.dense is None else self.dense


Rule = Callable[[list[Delta], Options], tuple[Pair, float]]


# ---- the rules ------------------------------------------------------------------------------------------------------
def _sum(deltas: list[Delta]) -> Pair:
    return ops.stacked([d.pair for d in deltas], [d.weight for d in deltas])


def _total_rank(deltas: list[Delta]) -> int:
    (m, _), (_, n) = deltas[0].pair[0].shape[-2:], deltas[0].pair[1].shape[-2:]
    return min(sum(d.rank for d in deltas), m, n)


def _cat(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
    return _sum(deltas), 0.0


def _linear(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
    return ops.compressed(_sum(deltas), options.rank or _total_rank(deltas))


def _svd(deltas: list[Delta], options: Options) -> tuple[Pair, float]:
    pair, lost = ops.compressed(_sum(deltas), options.rank or max(d.rank for d in deltas))
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
                f"combination_type='{how}_factors' needs members that are plain LoRA adapters of one rank; use '{how}', "
                "which works on the deltas."
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
        _copy_companions(tuner, name, dict(zip(adapters, weights, strict=True)))
    return {_label(host.site): one.lost for host, one in combined.items()}


def _checked(
    tuner: Tuner, adapters: Sequence[str], weights: Sequence[float], name: str, kind: str, density: float | None, by: str
) -> Rule:
    tuner._require(*adapters)
    tuner._check_name(name)
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ValueError(
            f"Give one weight for each of at least one distinct adapter, not {len(weights)} for {list(adapters)}."
        )
    if kind not in RULES:
        raise ValueError(f"Unknown combination_type '{kind}'; known are {', '.join(RULES)}.")
    if any(kind.startswith(entrywise) for entrywise in ENTRYWISE) and (density is None or not 0 < density <= 1):
        raise ValueError(f"combination_type='{kind}' needs a density in (0, 1], not {density}.")
    if by not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method must be 'total' or 'frequency', not '{by}'.")
    for member in adapters:
        if member in tuner.prompts:
            raise ValueError(f"'{member}' is a prompt, which has no delta to combine.")
    for option in ("modules_to_save", "trainable_token_indices"):
        holders = [m for m in adapters if getattr(tuner.configs[m], option, None)]
        if len(holders) > 1:
            raise ValueError(
                f"The adapters {' and '.join(holders)} each hold {option}, of which there is no sum; combine adapters of "
                "which at most one does."
            )
    return RULES[kind]


# ---- reading --------------------------------------------------------------------------------------------------------
@dataclass
class Combined:
    """The result at one site: factors (out, in side), what goes onto the bias, and the error of the rank."""

    pair: Pair
    bias: Tensor | None
    lost: float


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


def is_own(tuner: Tuner, name: str, adapter: Adapter) -> bool:
    """Whether an adapter is the method's own, not one that serves an option (a bias, a saved module)."""
    build = registry.of(tuner.configs[name].peft_type).build  # type: ignore[arg-type]
    return isinstance(adapter.each[0] if isinstance(adapter, Stacked) else adapter, build)


def additive(name: str, adapter: Adapter) -> Additive | Stacked:
    """The adapter, if it has a delta.

    Raises:
        ValueError: it has none.
    """
    first = adapter.each[0] if isinstance(adapter, Stacked) else adapter
    where = f"Adapter '{name}' ({type(first).__name__}) at '{adapter.site.path}'"
    if not isinstance(first, Additive) or not first.mergeable:
        raise ValueError(f"{where} is no sum onto the weight, so it cannot be combined or turned into LoRA.")
    if first.residual is not None and first.delta_factors() is None:
        raise ValueError(
            f"{where} replaced the base weight at its start and has no plain form for the original base; merge it instead."
        )
    return adapter  # type: ignore[return-value]


def delta_of(adapter: Additive | Stacked, weight: float = 1.0) -> Delta:
    """One adapter's delta, with factors: its own, or such as hold it exactly."""
    own = adapter.delta_factors() if isinstance(adapter, Additive) else None
    if own is not None:
        plain = None
        if adapter.residual is None and hasattr(adapter, "matrices") and hasattr(adapter, "scaling"):
            a, b = adapter.matrices()
            plain = a.float(), b.float(), adapter.scaling
        return Delta((own[0].float(), own[1].float()), weight, plain=plain)
    each = adapter.each if isinstance(adapter, Stacked) else None
    dense = adapter.delta_weight() if each is None else torch.stack([one.delta_weight() for one in each])  # type: ignore
    dense = as_matrices(adapter.site, dense.float())
    return Delta(ops.factored(dense)[0], weight, dense=dense)


def as_matrices(site: Site, weight: Tensor) -> Tensor:
    """A weight as ``matrices`` of LoRA sees it: (experts, out, in), (groups, out / groups, n), or (out, in)."""
    if site.kernel:
        groups = getattr(site, "groups", 1)
        return weight.reshape(groups, weight.shape[0] // groups, -1)
    return weight


# ---- writing --------------------------------------------------------------------------------------------------------
def plant(tuner: Tuner, name: str, members: Sequence[str], combined: dict[Adapted, Combined]) -> None:
    """Add a plain LoRA adapter that holds the combined factors."""
    config = lora_config(tuner, members, combined)
    tuner.add(name, config, only={host.site.path for host in combined})
    try:
        for host, one in combined.items():
            fill(host.adapters[name], one)
    except BaseException:
        tuner.delete(name)
        raise


def fill(adapter: Any, one: Combined) -> None:
    """Put factors (with scale 1) and bias into a LoRA adapter; a lower rank than its own leaves zeros."""
    up, down = one.pair
    a, b = adapter.matrices()
    a.zero_()
    b.zero_()
    rank = down.shape[-2]
    a[..., :rank, :].copy_(down.reshape(*a.shape[:-2], rank, a.shape[-1]))
    b[..., :rank].copy_(up.reshape(*b.shape[:-1], rank))
    if one.bias is not None:
        adapter.lora_B.bias.copy_(one.bias)


def lora_config(tuner: Tuner, members: Sequence[str], combined: dict[Adapted, Combined]) -> Any:
    """Settings of a LoRA at exactly these sites, alpha equal to the rank everywhere."""
    first = tuner.configs[members[0]]
    configs = [tuner.configs[m] for m in members]
    ranks = {host: one.pair[1].shape[-2] * getattr(host.site, "groups", 1) for host, one in combined.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(_label(host.site))}": r for host, r in ranks.items() if r != common}
    biases = {getattr(c, "bias", "none") for c in configs} - {"none"}
    saved = [m for c in configs for m in getattr(c, "modules_to_save", None) or ()]
    tokens = [c.trainable_token_indices for c in configs if getattr(c, "trainable_token_indices", None)]
    settings = {
        "r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "lora_bias": any(one.bias is not None for one in combined.values()),
        "bias": "none" if not biases else "all" if "all" in biases else "lora_only",
        "modules_to_save": saved or None, "trainable_token_indices": copy.deepcopy(tokens[0]) if tokens else None,
        "ensure_weight_tying": any(getattr(c, "ensure_weight_tying", False) for c in configs),
        "fan_in_fan_out": any(getattr(c, "fan_in_fan_out", False) for c in configs),
        "task_type": first.task_type, "base_model_name_or_path": first.base_model_name_or_path,
        "revision": first.revision, "auto_mapping": copy.deepcopy(first.auto_mapping),
    }  # fmt: skip
    build = registry.of("LORA").config
    return build(**settings | _places(tuner, configs, combined, build))


PLACES = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")


def _places(tuner: Tuner, configs: list[Any], combined: dict[Adapted, Combined], build: type) -> dict[str, Any]:
    """Words for exactly these sites: the members' own, their names' ends, or, where those say too much, a regex."""
    sites = [host.site for host in combined]
    bare = [s for s in sites if s.kind == "parameter" and not isinstance(s.module, nn.MultiheadAttention)]
    paths = list(dict.fromkeys(s.path for s in sites if s not in bare))
    parameters = [f"{s.path}.{s.parameter}" for s in bare]
    wanted = {(p, None) for p in paths} | {(s.path, s.parameter) for s in bare}
    ends = sorted({p.rpartition(".")[2] for p in paths})
    offers: list[dict[str, Any]] = [{f: copy.deepcopy(getattr(configs[0], f, None)) for f in PLACES}]
    offers += [{"target_modules": ends, "target_parameters": parameters or None}]
    offers += [{"target_modules": "|".join(map(re.escape, paths)) or [], "target_parameters": parameters or None}]
    for offer in offers[:2]:
        try:
            found = targets.find(tuner.model, build(**offer))
        except (ValueError, TypeError):
            continue
        if {(t.path, t.parameter) for t in found} == wanted:
            return offer
    return offers[2]


def _label(site: Site) -> str:
    """A site's name as ``rank_pattern`` sees it."""
    return f"{site.path}.{site.parameter}" if site.kind == "parameter" and not site.below else site.path


def _copy_companions(tuner: Tuner, name: str, members: dict[str, float]) -> None:
    """Trained biases add up; a saved module or trained rows, which one member may hold, are taken as they are."""
    for host in tuner.hosts(name):
        new = host.adapters[name]
        if is_own(tuner, name, new):
            continue
        start = {k: v.clone() for k, v in new.state_dict().items()}
        for member, weight in members.items():
            if member not in host.adapters:
                continue
            for key, value in host.adapters[member].state_dict().items():
                own = new.state_dict()[key]
                own.add_(weight * (value - start[key])) if new.overrides() is not None else own.copy_(value)
