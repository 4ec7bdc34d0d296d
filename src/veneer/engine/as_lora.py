"""Any additive adapter as LoRA: its delta read as factors; factors planted as one plain LoRA adapter (alpha = r)."""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Sequence
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
class Delta:
    """One member's effect on one weight, as matrices (..., out, in)."""

    weight: float
    own: Pair | None = None
    """The factors that the method itself holds."""
    dense: Tensor | None = None
    plain: tuple[Tensor, Tensor, float] | None = None
    """(A, B, s) where the member is nothing but s B A."""

    @functools.cached_property
    def pair(self) -> Pair:
        """Factors that hold the delta exactly."""
        return ops.factored(self.matrix)[0] if self.own is None else self.own

    @property
    def rank(self) -> int:
        return self.pair[0].shape[-1]

    @property
    def matrix(self) -> Tensor:
        return self.pair[0] @ self.pair[1] if self.dense is None else self.dense

    def best(self, rank: int | float) -> tuple[Pair, float]:
        """The best factors of this rank, or of the least rank that holds this share of the energy; and their error."""
        if isinstance(rank, int):
            rank = min(rank, *self.limits)
        return ops.compressed(self.own, rank) if self.own is not None else ops.factored(self.matrix, rank)

    @property
    def limits(self) -> tuple[int, int]:
        """(out, in) of one matrix: no rank is above either."""
        if self.own is not None:
            return self.own[0].shape[-2], self.own[1].shape[-1]
        return self.matrix.shape[-2], self.matrix.shape[-1]


@dataclass
class Combined:
    """The result at one site: factors (out, in side), what goes onto the bias, and the error of the rank."""

    pair: Pair
    bias: Tensor | None
    lost: float


# ---- reading ---------------------------------------------------------------------------------------------------------
def is_own(tuner: Tuner, name: str, adapter: Adapter) -> bool:
    """Whether an adapter is the method's own, not one that serves an option (a bias, a saved module)."""
    build = registry.of(tuner.configs[name].peft_type).build  # type: ignore[arg-type]
    first = adapter.each[0] if isinstance(adapter, Stacked) else adapter
    return isinstance(first, build) or type(first).__module__ not in {
        option.__module__ for option in registry.AUXILIARY.values()
    }


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
            f"{where} replaced the base weight at its start and has no plain form for the original base; "
            "merge it instead."
        )
    return adapter  # type: ignore[return-value]


def delta_of(adapter: Additive | Stacked, weight: float = 1.0) -> Delta:
    """One adapter's delta: its own factors, or the matrices."""
    own = adapter.delta_factors() if isinstance(adapter, Additive) else None
    if own is not None:
        plain = None
        if adapter.residual is None and hasattr(adapter, "matrices") and hasattr(adapter, "scaling"):
            a, b = adapter.matrices()
            plain = a.float(), b.float(), adapter.scaling
        return Delta(weight, (own[0].float(), own[1].float()), plain=plain)
    each = adapter.each if isinstance(adapter, Stacked) else None
    dense = adapter.delta_weight() if each is None else torch.stack([one.delta_weight() for one in each])  # type: ignore
    return Delta(weight, dense=as_matrices(adapter.site, dense.float()))


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
    pattern = {f"^{re.escape(label(host.site))}": r for host, r in ranks.items() if r != common}
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


def label(site: Site) -> str:
    """A site's name as ``rank_pattern`` sees it."""
    return f"{site.path}.{site.parameter}" if site.kind == "parameter" and not site.below else site.path


def copy_companions(tuner: Tuner, name: str, members: dict[str, float]) -> None:
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
