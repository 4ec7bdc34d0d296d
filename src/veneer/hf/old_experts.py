"""Adapters of experts from before they were fused, read as adapters of the stacks ``(experts, out, in)`` of today.

    per expert e (Linear w1, w3 over the same input)      fused (gate_up_proj = [w1; w3])
    W1_e + s1 B1 A1, W3_e + s3 B3 A3                      W_e + s [s1/s B1, 0; 0, s3/s B3] [A1; A3]

So the fused adapter has the sum of the ranks, and equals the old one to rounding. Which old names make up which fused
parameter, and how a model's modules were renamed, is transformers' own table of checkpoint conversions. An adapter of
stacks that were stored turned, ``(experts, in, out)``, is turned: B^T and A^T change places.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.patterns import Expression, ends_with
from veneer.core.sites import WeightSite, sites_for
from veneer.methods.lora_config import VARIANTS_BY_FIELD, LoraConfig

PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<path>.+?)(?P<nested>(\.base_layer)*)\.lora_(?P<half>[AB])\.weight")
_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<index>\d+)\.(?P<leaf>\w+)")


@dataclass(frozen=True)
class Part:
    """What an old layer of an expert is now: rows ``place`` of ``parts`` equal stretches of a fused parameter."""

    parameter: str
    place: int
    parts: int


@dataclass(frozen=True)
class Conversion:
    """How a family of models was rebuilt: old leaf -> its part, (pattern, replacement) of paths, turned parameters."""

    leaves: dict[str, Part]
    renamed: list[tuple[str, str]]
    turned: frozenset[str]

    def path(self, old: str) -> str:
        """Where a module of the old model is now."""
        new = f".{old}.weight"
        for pattern, replacement in self.renamed:
            new = re.sub(pattern, replacement, new)
        return new.removeprefix(".").removesuffix(".weight")


def conversion_of(model: nn.Module) -> Conversion | None:
    """What transformers knows of a model's older layout; None where there is none, or transformers is older itself."""
    try:
        from transformers.conversion_mapping import WeightRenaming, get_checkpoint_conversion_mapping
    except ImportError:
        return None
    family = getattr(getattr(model, "config", None), "model_type", None)
    leaves: dict[str, Part] = {}
    renamed: list[tuple[str, str]] = []
    turned = set()
    for rule in (get_checkpoint_conversion_mapping(family) if family else None) or ():
        sources, target = rule.source_patterns, rule.target_patterns[0]
        if isinstance(rule, WeightRenaming):
            renamed += [(source, target) for source in sources]
        elif all(".experts.*." in source for source in sources):
            for place, source in enumerate(sources):
                leaf = source.removesuffix(".weight").rpartition(".")[2]
                leaves[leaf] = Part(target.rpartition(".")[2], place, len(sources))
        elif any(type(step).__name__ == "Transpose" for step in rule.operations):
            turned.add(target.rpartition(".")[2])
    return Conversion(leaves, renamed, frozenset(turned)) if leaves or turned else None


def adopted(
    model: nn.Module, config: Any, tensors: dict[str, Tensor], training: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """A saved adapter's settings and tensors as they fit the model's fused experts; as they are, if they fit already.

    Args:
        model: the base model.
        config: the adapter's settings; left as they are.
        tensors: file key -> tensor.
        training: it is going to be trained on.

    Raises:
        ValueError: an adapter of old experts that has no fused form, or one that can be read in two ways.
    """
    conversion = conversion_of(model) if isinstance(config, LoraConfig) else None
    if conversion is None:
        return config, tensors
    if any(_expert(key, conversion, model) for key in tensors):
        return _Fusing(model, config, conversion, training).convert(tensors)
    return config, _unturned(model, config, conversion, tensors)


def _expert(key: str, conversion: Conversion, model: nn.Module) -> re.Match[str] | None:
    """The parts of a key of one expert's layer that the model does not have any more."""
    found = _KEY.fullmatch(key)
    expert = _EXPERT.fullmatch(found["path"]) if found else None
    if expert is None or expert["leaf"] not in conversion.leaves or _module(model, expert[0]) is not None:
        return None
    return expert


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


Pairs = dict[tuple[int, int], dict[str, Tensor]]
"""(expert, place in the fused parameter) -> its factors, "A" (r, in) and "B" (out, r), B times its scale."""


class _Fusing:
    """One adapter on its way from layers of experts to stacks."""

    def __init__(self, model: nn.Module, config: LoraConfig, conversion: Conversion, training: bool):
        variants = [f for f in (*VARIANTS_BY_FIELD, "lora_bias") if getattr(config, f)]
        if variants:
            raise ValueError(
                f"This adapter was trained on experts as layers of their own with {variants[0]}, which has no form for "
                f"the fused experts of {type(model).__name__}; merge it with the transformers release it was made with."
            )
        self.model, self.conversion = model, conversion
        self.old, self.config = config, copy.deepcopy(config)
        if config.lora_dropout and training:
            warnings.warn("Fused experts take no lora_dropout; this adapter trains on without.", stacklevel=4)
        self.config.lora_dropout = 0.0

    def convert(self, tensors: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
        groups: dict[tuple[str, str], Pairs] = {}
        left: dict[str, Tensor] = {}
        for key, value in tensors.items():
            expert, half = _expert(key, self.conversion, self.model), key.rpartition("lora_")[2][0]
            if expert is None:
                left[self._renamed(key)] = value
                continue
            part = self.conversion.leaves[expert["leaf"]]
            group = groups.setdefault((self.conversion.path(expert["experts"]), part.parameter), {})
            scale = self.old.at(expert[0]).scaling if half == "B" else 1.0
            group.setdefault((int(expert["index"]), part.place), {})[half] = scale * value.float()
        out = dict(left)
        stacks = {place: self._stacked(*place, pairs) for place, pairs in groups.items()}
        self._say(stacks, left)
        for (path, parameter), (a, b) in stacks.items():
            nested = ".base_layer" * _depth(self.model, path, parameter, {p for q, p in stacks if q == path})
            out |= _laid_out(f"{PREFIX}{path}{nested}", a, b / self._scale(path, parameter))
        return self.config, out

    def _renamed(self, key: str) -> str:
        found = _KEY.fullmatch(key)
        if found is None or _module(self.model, found["path"]) is not None:
            return key
        return key.replace(found["path"], self.conversion.path(found["path"]), 1)

    def _stacked(self, path: str, parameter: str, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """A (experts, r, in) and B (experts, out, r) of a stack; zero where an expert had no adapter."""
        module = _module(self.model, path)
        if module is None or parameter not in module._parameters:
            raise ValueError(
                f"The adapter has experts at '{path}', where {type(self.model).__name__} has no '{parameter}'; it was "
                "trained on another model."
            )
        site = WeightSite(path, module, parameter)
        parts = max(part.parts for part in self.conversion.leaves.values() if part.parameter == parameter)
        stretch = site.out_features // parts
        rank = max(sum(p["A"].shape[0] for (e, _), p in pairs.items() if e == expert) for expert, _ in pairs)
        a = torch.zeros(site.stack or 1, rank, site.in_features)
        b = torch.zeros(site.stack or 1, site.out_features, rank)
        filled = dict.fromkeys(range(len(a)), 0)
        for (expert, place), pair in sorted(pairs.items()):
            if expert >= len(a) or pair.keys() != {"A", "B"} or not _fits(pair, site.in_features, stretch):
                shapes = ", ".join(f"lora_{half} {tuple(t.shape)}" for half, t in sorted(pair.items()))
                raise ValueError(
                    f"Expert {expert} of '{path}' has {shapes}, which fits no expert of {type(self.model).__name__} "
                    f"({len(a)} experts, {site.in_features} -> {stretch}); it was trained on another model."
                )
            start, r = filled[expert], pair["A"].shape[0]
            a[expert, start : start + r] = pair["A"]
            b[expert, place * stretch : (place + 1) * stretch, start : start + r] = pair["B"]
            filled[expert] += r
        return a, b

    def _say(self, stacks: dict[tuple[str, str], tuple[Tensor, Tensor]], left: dict[str, Tensor]) -> None:
        """Have the settings name the stacks, with their ranks, and no layer that is gone."""
        paths = [name for name, _ in self.model.named_parameters()]
        named: dict[str, int] = {}
        for (path, parameter), (a, _) in stacks.items():
            short = f"{path.rpartition('.')[2]}.{parameter}"
            every = {p for p in paths if ends_with(p, short)} == {f"{q}.{p}" for q, p in stacks if p == parameter}
            name = short if every else f"{path}.{parameter}"
            named[name] = max(named.get(name, 0), a.shape[1])
        for place, (a, b) in stacks.items():  # layers of one name have one rank
            more = max(r for name, r in named.items() if ends_with(".".join(place), name)) - a.shape[1]
            stacks[place] = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))
        whole = {path for path in self._paths(left) if not sites_for(path, self.model.get_submodule(path))}
        named |= {f"{path}.weight": self.old.r for path in whole}
        self.config.target_parameters = [*(self.config.target_parameters or ()), *named]
        for name, rank in named.items():
            if rank != self.old.r:
                grown = self.old.scaling * (math.sqrt(rank) if self.old.use_rslora else rank)
                self.config.rank_pattern[name] = rank
                self.config.alpha_pattern[name] = int(grown) if grown == int(grown) else grown  # type: ignore[assignment]
        self._drop_gone(whole)

    def _paths(self, tensors: dict[str, Tensor]) -> set[str]:
        found = (_KEY.fullmatch(key) for key in tensors)
        return {f["path"] for f in found if f and _module(self.model, f["path"]) is not None}

    def _drop_gone(self, whole: set[str]) -> None:
        """Leave out of ``target_modules`` what names only experts, or a router that is no linear layer any more."""
        names, paths = self.config.target_modules, [p for p, _ in self.model.named_modules() if p not in whole]
        if isinstance(names, str):
            rule = Expression(names)
            self.config.target_modules = names if any(rule.match(p) for p in paths) else []
        elif names is not None:
            self.config.target_modules = {n for n in names if any(ends_with(p, n) for p in paths)}

    def _scale(self, path: str, parameter: str) -> float:
        return self.config.at(f"{path}.{parameter}").scaling


def _fits(pair: dict[str, Tensor], inside: int, outside: int) -> bool:
    return pair["A"].shape[1] == inside and pair["B"].shape[0] == outside


def _depth(model: nn.Module, path: str, parameter: str, adapted: set[str]) -> int:
    """How many wrappers of the same module stand around a parameter's own: the last one planted is the outermost."""
    order = [name for name in model.get_submodule(path)._parameters if name in adapted]
    return len(order) - 1 - order.index(parameter)


def _laid_out(place: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A (experts, r, in) as (experts r, in), expert-major, and B (experts, out, r) as (out, r experts)."""
    return {
        f"{place}.lora_A.weight": a.reshape(-1, a.shape[-1]).contiguous(),
        f"{place}.lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous(),
    }


# ---- stacks that were stored turned, or in another order -------------------------------------------------------------
def _unturned(
    model: nn.Module, config: LoraConfig, conversion: Conversion, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Adapters of stacks ``(experts, in, out)`` for a model whose stacks are ``(experts, out, in)`` today."""
    out = dict(tensors)
    for path, adapted in _adapted_stacks(model, config, conversion):
        places = [f"{PREFIX}{path}{'.base_layer' * _depth(model, path, p, set(adapted))}" for p in adapted]
        pairs = [pair for place in places if (pair := _pair(tensors, place)) is not None]
        if len(pairs) < len(places):
            continue
        sites = [WeightSite(path, model.get_submodule(path), parameter) for parameter in adapted]
        both = list(zip(sites, pairs, strict=True))
        straight = all(_shaped(pair, site.in_features, site.out_features) for site, pair in both)
        turned = all(_shaped(pair, site.out_features, site.in_features) for site, pair in both)
        if straight and turned:
            raise ValueError(
                f"The adapter's tensors at '{path}' fit its experts both as they are stored today and as transformers "
                "4 stored them (turned), so what they mean cannot be told; name both gate_up_proj and down_proj in "
                "target_parameters, or save the adapter again from the release it was trained with."
            )
        for (site, (a, b)), place in zip(both, places, strict=True) if turned else ():
            stack = site.stack or 1
            old_a, old_b = a.reshape(stack, -1, a.shape[1]), b.reshape(b.shape[0], -1, stack)
            out |= _laid_out(place, old_b.permute(2, 1, 0), old_a.transpose(1, 2))
    return out


def _adapted_stacks(model: nn.Module, config: LoraConfig, conversion: Conversion) -> Iterator[tuple[str, list[str]]]:
    wanted = config.target_parameters or ()
    for path, module in model.named_modules() if wanted and conversion.turned else ():
        names = [p for p in module._parameters if any(ends_with(f"{path}.{p}", name) for name in wanted)]
        if names and conversion.turned.issuperset(names):
            yield path, names


def _pair(tensors: dict[str, Tensor], place: str) -> tuple[Tensor, Tensor] | None:
    a, b = (tensors.get(f"{place}.lora_{half}.weight") for half in "AB")
    return None if a is None or b is None else (a, b)


def _shaped(pair: tuple[Tensor, Tensor], inside: int, outside: int) -> bool:
    return pair[0].shape[1] == inside and pair[1].shape[0] == outside
