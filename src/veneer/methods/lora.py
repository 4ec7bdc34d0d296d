"""LoRA: Low-Rank Adaptation (Hu et al., 2021, arXiv:2106.09685); rsLoRA (Kalajdzievski, 2023, arXiv:2312.03732).

    W' = W + s B A        A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r) for rsLoRA

A starts Kaiming-uniform and B at zero, so the start is the base model. On a convolution A has the layer's own geometry
and B is 1x1; on an embedding A and B are tables, dW = (B A)^T; on a stack of E expert matrices A is (E r, in),
expert-major, and B (out, r E) with the expert index running fastest. Cost: 6 N r (in + out) FLOPs a training step
for N tokens, against the frozen layer's 4 N in out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Additive, Weight
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods import lora_split
from veneer.methods.lora_config import KINDS, VARIANTS
from veneer.methods.lora_config import STARTS as STARTS
from veneer.methods.lora_config import LoraConfig as LoraConfig
from veneer.methods.lora_config import start as start
from veneer.methods.sides import NO_DROPOUT
from veneer.ops.groups import gather, spread
from veneer.ops.lowrank import LowRank, lowrank

Factors = tuple[Tensor, Tensor]


def _kaiming(weight: Tensor) -> None:
    """Uniform within 1 / sqrt(inputs), as torch starts its own layers."""
    bound = 1 / math.sqrt(max(1, weight[0].numel()))
    weight.uniform_(-bound, bound)


@method("LORA", LoraConfig)
class Lora(Additive):
    """``y = base(x) + s B A drop(x)`` on linear and convolutional layers, through the layer kind's own factors."""

    stacks = True
    variants: ClassVar[dict[str, type[Lora]]] = VARIANTS
    """Config field -> the class that serves it; a variant announces itself with ``Lora.variant``."""

    @classmethod
    def variant(cls, field_name: str) -> Callable[[type], type]:
        """Have the decorated class serve configs whose ``field_name`` is set."""

        def enter(build: type) -> type:
            cls.variants[field_name] = build
            return build

        return enter

    @classmethod
    def plan(cls, config: LoraConfig, sites: Sequence[Site]) -> nn.Module | None:
        build = cls._chosen(config)
        return None if build.plan.__func__ is Lora.plan.__func__ else build.plan(config, sites)

    @classmethod
    def _chosen(cls, config: LoraConfig) -> type[Lora]:
        given = config.__dict__
        chosen = [field for field in cls.variants if given[field]]
        if len(chosen) > 1:
            raise ValueError(f"LoraConfig sets both {' and '.join(chosen)}; at most one variant fits a layer.")
        return cls.variants[chosen[0]] if chosen else cls

    @classmethod
    def on(cls, site: Site, config: LoraConfig, shared: nn.Module | None = None) -> Additive:
        build = cls._chosen(config)
        if build is not cls and build.on.__func__ is not cls.on.__func__:
            return build.on(site, config, shared)
        if site.kind == "embedding":
            build = _kind(build, "embedding", LoraEmbedding, site)
        elif site.kind == "parameter":
            build = _kind(build, "parameter", LoraWeight, site)
        elif site.kind in KINDS:
            build = _kind(build, site.kind, KINDS[site.kind], site)
        elif site.kind == "opaque":
            return super().on(site, config, shared)
        return build.build(site, config, shared)

    def __init__(self, site: Site, config: LoraConfig):
        super().__init__(site, config)
        # Past torch's own way to set attributes: a large model has thousands of these.
        self.__dict__.update(
            r=config.r, lora_alpha=config.lora_alpha, scaling=config.scaling, arriving=None, rested=None
        )
        self.__dict__.update(splits=lora_split.splits(config.init_lora_weights), lora_dropout=NO_DROPOUT)
        self._buffers.update(start_A=None, start_B=None)
        self._non_persistent_buffers_set.update(self._buffers)
        if config.lora_dropout:
            self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.make_factors(site, config)
        self.start(config)

    def make_factors(self, site: Site, config: LoraConfig) -> None:
        self._modules.update(zip(("lora_A", "lora_B"), site.factors(config.r), strict=True))
        if config.lora_bias:
            self.lora_B.bias = nn.Parameter(torch.zeros(site.out_features))

    def start(self, config: LoraConfig) -> None:
        how = config.init_lora_weights
        self.reset(how)
        family = how.split("_niter_")[0] if isinstance(how, str) else None
        if family in STARTS:
            lora_split.refuse_unfit(config, family)
            STARTS[family](self, config)

    def reset(self, how: bool | str = True) -> None:
        """Draw A and B: True Kaiming and zero, "gaussian" N(0, 1/r) and zero, False both Kaiming."""
        up = self._modules["lora_B"]._parameters  # thousands of times, as in ``__init__``
        a, b, bias = self._modules["lora_A"]._parameters["weight"], up["weight"], up.get("bias")
        with torch.no_grad():
            a.normal_(std=1 / self.r) if how == "gaussian" else _kaiming(a)
            b.zero_() if how is not False else _kaiming(b)
            if how is False and bias is not None:
                bias.uniform_(-1 / math.sqrt(self.r), 1 / math.sqrt(self.r))

    def delta(self, x: Tensor) -> Tensor:
        return self.branch(x, self.lora_dropout.p if self.training else 0.0)

    def low_rank(self) -> LowRank | None:
        return None if type(self) is not Lora or self.site.kernel else self._low_rank()

    def _low_rank(self, gain: Tensor | None = None) -> LowRank | None:
        if isinstance(self.scaling, Tensor):
            return None
        down, up = self._modules["lora_A"]._parameters, self._modules["lora_B"]._parameters
        dropout = self.lora_dropout.p if self.training else 0.0
        return LowRank(down["weight"], up["weight"], self.scaling, dropout, up["bias"], gain)

    def branch(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """``s B A drop(x)``."""
        a, b = self.factors()
        if self.site.kernel:
            h = self.lora_A._conv_forward(F.dropout(x, dropout) if dropout else x, a, None)
            return self.lora_B._conv_forward(h, b, self.lora_B.bias) * self.scaling
        return lowrank(x, a, b, self.scaling, dropout, self.lora_B.bias)

    def delta_weight(self) -> Tensor:
        a, b = self.matrices()
        return (self.scaling * (b @ a)).reshape(self.site.shape)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        a, b = self.matrices()
        own = type(self).delta_weight is not Lora.delta_weight
        if own or weight.dim() != 2 or a.dim() != 2 or isinstance(self.scaling, Tensor):
            return super().merged(weight, bias)
        change = self.delta_bias()
        if change is not None:
            bias = change.to(weight) if bias is None else bias + change.to(bias)
        return torch.addmm(weight, b.to(weight), a.to(weight), alpha=self.scaling), bias  # in one pass over W

    def matrices(self, factors: Factors | None = None) -> Factors:
        """(A, B) as matrices: s B A is the delta, up to its shape; a leading dimension counts groups or experts.

        Args:
            factors: others of any rank in this layer's layout; default: its own.

        Returns:
            A (..., r, in * kernel) and B (..., out, r), r and out counted per group.
        """
        a, b = factors or self.factors()
        if not self.site.kernel:
            return a, b
        groups = self.lora_A.groups
        if groups != self.site.groups:
            raise ValueError(
                f"LoRA at '{self.site.path}' mixes the layer's {self.site.groups} groups, so its delta is no grouped "
                f"weight and cannot be merged; train it anew with a rank that is a multiple of {self.site.groups}."
            )
        return a.reshape(groups, a.shape[0] // groups, -1), b.reshape(groups, -1, b.shape[1])

    def delta_factors(self) -> Factors | None:
        a, b = self.matrices()
        if self.residual is not None and self.start_A is None:
            return None  # LoftQ: the base that was put in is another one, by no difference of low rank
        if self.start_A is not None:  # against the original base, a start that moved a part of it counts as well
            a, b = torch.cat([a, self.start_A], dim=-2), torch.cat([b, -self.start_B], dim=-1)
        return self.scaling * b, a

    def laid_out(self, a: Tensor, b: Tensor) -> Factors:
        """The inverse of ``matrices``."""
        return a.reshape(-1, *self.factors()[0].shape[1:]), b.reshape(-1, b.shape[-1], *[1] * len(self.site.kernel))

    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    def factors(self) -> Factors:
        """A and B in their own layout."""
        return self.lora_A.weight, self.lora_B.weight

    def delta_bias(self) -> Tensor | None:
        return None if self.lora_B.bias is None else self.scaling * self.lora_B.bias

    def ready(self) -> None:
        lora_split.arrive(self)

    def original_form(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self.start_A is None else lora_split.doubled(self, tensors)

    @classmethod
    def original_config(cls, config: LoraConfig, adapters: Sequence[Adapter]) -> LoraConfig:
        moved = any(getattr(a, "start_A", None) is not None for a in adapters)
        return lora_split.doubled_config(config) if moved else config

    def _apply(self, fn: Callable, recurse: bool = True) -> Lora:
        start = self.start_A, self.start_B
        super()._apply(fn, recurse)
        if self.start_A is not None and self.start_A.is_meta:  # a file fills A and B, but nothing would fill these
            self.start_A, self.start_B = start
        return self

    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        a = tensors.get("lora_A.weight")
        if a is None or getattr(self.lora_A, "groups", 1) == 1:
            return tensors
        return tensors | {"lora_A.weight": spread(a, self.lora_A.groups)}  # the peer's A is a plain convolution

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = self._within_groups(tensors)
        return lora_split.halved(self, tensors) if self.splits else tensors

    def _within_groups(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        a, down = tensors.get("lora_A.weight"), getattr(self, "lora_A", None)
        groups = getattr(down, "groups", 1)
        if a is None or groups == 1 or a.dim() != down.weight.dim() or a.shape[1] != groups * down.weight.shape[1]:
            return tensors
        own = gather(a, groups)
        if own is None:  # trained across the groups: take that form, which runs but cannot be merged
            plain = torch.empty(down.out_channels, down.in_channels, *down.kernel_size, device=a.device)
            down.weight = nn.Parameter(plain.to(down.weight), requires_grad=down.weight.requires_grad)
            down.groups, own = 1, a
        return tensors | {"lora_A.weight": own}


class LoraEmbedding(Lora):
    """LoRA on an embedding: rows ``s B A[:, id]``, times the layer's own scale; keys without ``.weight``."""

    def make_factors(self, site: Site, config: LoraConfig) -> None:
        if config.lora_bias:
            raise ValueError(
                f"lora_bias=True is not defined for the embedding '{site.path}'; exclude it or turn it off."
            )
        self.lora_embedding_A = nn.Parameter(torch.empty(config.r, site.in_features))
        self.lora_embedding_B = nn.Parameter(torch.empty(site.out_features, config.r))

    def reset(self, how: bool | str = True) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)
        if how is False:
            nn.init.normal_(self.lora_embedding_A)

    def branch(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        a, b = self.factors()
        return self.site.lookup(x, a.T) @ b.T * (self.scaling * self.site.scale)

    factor_names = ("lora_embedding_A", "lora_embedding_B")

    def factors(self) -> Factors:
        return self.lora_embedding_A, self.lora_embedding_B

    def delta_bias(self) -> None:
        return None


class LoraWeight(Lora):
    """LoRA on a bare parameter, or on a stack of E of them: A (E r, in) expert-major, B (out, r E) expert-fastest."""

    def make_factors(self, site: Site, config: LoraConfig) -> None:
        if config.lora_dropout or config.lora_bias:
            option = "lora_dropout" if config.lora_dropout else "lora_bias"
            raise ValueError(
                f"{option} cannot act on the bare parameter '{site.path}', whose input is out of reach; turn it off."
            )
        self.lora_A, self.lora_B = site.factors(config.r * (site.stack or 1))

    def matrices(self, factors: Factors | None = None) -> Factors:
        (a, b), stack = factors or self.factors(), self.site.stack
        if stack is None:
            return a, b
        return a.reshape(stack, -1, a.shape[1]), b.reshape(b.shape[0], -1, stack).permute(2, 0, 1)

    def low_rank(self) -> LowRank | None:
        return LowRank(*self.matrices(), self.scaling) if type(self) is LoraWeight and self.site.stack else None

    def laid_out(self, a: Tensor, b: Tensor) -> Factors:
        if self.site.stack is None:
            return a, b
        return a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)


def _kind(build: type[Lora], kind: str, plain: type[Lora], site: Site) -> type[Lora]:
    if build is Lora:
        return plain
    own = getattr(build, kind, None)
    if own is None:
        raise ValueError(
            f"{build.__name__} is not defined for the {kind} '{site.path}'; exclude it or choose plain LoRA."
        )
    return own
