"""Bottleneck adapters (Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2021, 2005.00247; He et al., 2022).

    after a module:   y = h + s W_u f(W_d h + b_d) + s b_u        h = base(x)
    beside a module:  y = h + s (W_u f(W_d x + b_d) + b_u)        W_d (m, dim), W_u (dim, m)

``placement`` says where, for known families: "houlsby" after attention and after the feed-forward part of each block,
"pfeiffer" after the feed-forward part alone, "parallel" beside it; for any other model, name the modules in
``target_modules``. W_u starts at zero, so the start is the base. Houlsby and Pfeiffer also train the norms: name
them in ``modules_to_save``. MAM (He et al.) is "parallel" with ``scaling=4`` together with prefix tuning:
``set_adapter(["parallel", "prefix"])`` (arXiv:2110.04366). Cost: 4 m dim a token and place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "swish": F.silu,
    "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "leakyrelu": F.leaky_relu, "linear": lambda x: x,
}  # fmt: skip

_OUTPUTS = (r".*\.layer\.\d+\.attention\.output\.dense", r".*\.layer\.\d+\.output\.dense")
_BLOCKS = (r".*\.self_attn", r".*\.mlp")
FAMILIES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "electra", "xlm-roberta", "camembert", "ernie", "layoutlm"), _OUTPUTS),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2",
         "stablelm", "starcoder2", "cohere", "granite", "smollm3"), _BLOCKS
    ),
    "gpt2": (r".*\.attn", r".*\.mlp"),
    "gpt_neox": (r".*\.attention", r".*\.mlp"),
    "opt": (r".*\.self_attn", r".*\.fc2"),
    "bart": (r".*\.(self_attn|encoder_attn)", r".*\.fc2"),
    "t5": (r".*\.(SelfAttention|EncDecAttention)", r".*\.DenseReluDense"),
    "distilbert": (r".*\.attention", r".*\.ffn"),
    "vit": (r".*\.attention\.output\.dense", r".*\.layer\.\d+\.output\.dense"),
}  # fmt: skip
"""model_type -> (its attention parts, its feed-forward parts), as regular expressions for whole paths."""


@dataclass
class BottleneckConfig(LayerConfig):
    """Settings of a bottleneck adapter.

    Attributes:
        placement: "houlsby", "pfeiffer" or "parallel".
        reduction_factor: the width over the bottleneck's.
        bottleneck_size: the bottleneck's width itself, instead.
        non_linearity: relu, gelu, gelu_new, swish, tanh, sigmoid, leakyrelu or linear.
        scaling: a number, or "learned" (starts at 1).
        bottleneck_dropout: on what the bottleneck reads.
        init_weights: False starts W_u at normal draws as well.
        reads: "output": as above; "sum" and "residual" are what the AdapterHub library's ``seq_bn`` and ``par_bn`` read
            (``veneer.hf.adapterhub``): the feed-forward part's output plus the state that passes it by, normed where
            the model does so there, or that state alone. The module named is then one that holds all of it.

    Raises:
        ValueError: at ``get_peft_model``: an unknown placement or non-linearity, or senseless sizes.
    """

    placement: str = "pfeiffer"
    reduction_factor: float = 16
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    scaling: float | str = 1.0
    bottleneck_dropout: float = 0.0
    init_weights: bool = True
    reads: str = "output"

    type: ClassVar[str | None] = "BOTTLENECK"

    def places(self, model_type: str | None) -> str | None:
        """``target_modules`` for a model family; None where it is not known."""
        attention, feedforward = FAMILIES.get(model_type or "", (None, None))
        if feedforward is None:
            return None
        return f"({attention}|{feedforward})" if self.placement == "houlsby" else feedforward

    def check(self) -> None:
        """Refuse what no layer could honour."""
        if self.placement not in ("houlsby", "pfeiffer", "parallel"):
            raise ValueError(f"placement must be 'houlsby', 'pfeiffer' or 'parallel', not {self.placement!r}.")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"non_linearity must be one of {', '.join(NON_LINEARITIES)}, not {self.non_linearity!r}.")
        if self.reads not in ("output", "sum", "residual"):
            raise ValueError(f"reads must be 'output', 'sum' or 'residual', not {self.reads!r}.")
        if self.bottleneck_size is None and not self.reduction_factor > 0:
            raise ValueError(f"reduction_factor must be positive, not {self.reduction_factor}.")
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size must be a positive integer, not {self.bottleneck_size}.")
        if isinstance(self.scaling, str) and self.scaling != "learned":
            raise ValueError(f"scaling must be a number or 'learned', not {self.scaling!r}.")
        if not 0 <= self.bottleneck_dropout < 1:
            raise ValueError(f"bottleneck_dropout must lie in [0, 1), not {self.bottleneck_dropout}.")

    def size(self, width: int) -> int:
        """The bottleneck's width beside a module of this width."""
        return self.bottleneck_size or max(1, int(width / self.reduction_factor))


def widths(site: Site) -> tuple[int, int]:
    """(what a module reads, what it gives) per token: of its first and its last linear layer.

    Raises:
        ValueError: there is none in it.
    """
    found = [w for m in site.module.modules() if (w := _linear(m)) is not None]
    shape = getattr(site.module, "normalized_shape", None)
    if not found and shape:
        return int(shape[-1]), int(shape[-1])
    if not found:
        raise ValueError(
            f"The width of '{site.path}' ({type(site.module).__name__}) is unknown: there is no linear layer in it; "
            "name another module in target_modules, or one above it."
        )
    return found[0][0], found[-1][1]


def _linear(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "nf") and getattr(module, "weight", None) is not None:  # transformers' Conv1D
        return int(module.weight.shape[0]), int(module.nf)
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return module.in_features, module.out_features
    return None


class Inserted(Adapter):
    """Something added to what a module gives, reading that or, beside it, what the module reads."""

    whole_modules = True
    parallel = False

    def added(self, h: Tensor) -> Tensor:
        """(..., width read) -> (..., width given)."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Any:
        y = base(x)
        h = y[0] if isinstance(y, tuple) else y
        new = h + self.added((x if self.parallel else h).to(self.dtype)).to(h.dtype)
        return (new, *y[1:]) if isinstance(y, tuple) else new


@method("BOTTLENECK", BottleneckConfig)
class Bottleneck(Inserted):
    """Down, a non-linearity, up."""

    @classmethod
    def build(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Self:
        return super().build(site, config, shared) if config.reads == "output" else Within(site, config)  # type: ignore

    def __init__(self, site: Site, config: BottleneckConfig):
        super().__init__(site, config)
        self.parallel = config.placement == "parallel"
        read, given = widths(site)
        read = read if self.parallel and config.reads == "output" else given
        m = config.size(read)
        self.bottleneck_down, self.bottleneck_up = nn.Linear(read, m), nn.Linear(m, given)
        nn.init.zeros_(self.bottleneck_down.bias)
        nn.init.zeros_(self.bottleneck_up.bias)
        if config.init_weights:
            nn.init.zeros_(self.bottleneck_up.weight)
        self.scale = 1.0 if config.scaling == "learned" else float(config.scaling)
        self.bottleneck_scale = nn.Parameter(torch.ones(1)) if config.scaling == "learned" else None
        self.f, self.p = config.non_linearity, config.bottleneck_dropout

    def added(self, h: Tensor) -> Tensor:
        h = F.dropout(h, self.p, self.training)
        up = self.bottleneck_up(NON_LINEARITIES[self.f](self.bottleneck_down(h)))
        return up * (self.scale if self.bottleneck_scale is None else self.bottleneck_scale)


class Within(Bottleneck):
    """A bottleneck inside a module, added to its feed-forward part's output before the residual is."""

    reads_call = True

    def __init__(self, site: Site, config: BottleneckConfig):
        super().__init__(site, config)
        m = site.module
        self.post_norm = hasattr(m, "dense") and hasattr(m, "LayerNorm")
        self.alone = config.reads == "residual"
        if not self.post_norm and not (hasattr(m, "mlp") and hasattr(m, "post_attention_layernorm")):
            raise ValueError(
                f"reads='{config.reads}' needs a module with dense and LayerNorm, or a block with mlp and "
                f"post_attention_layernorm, but '{site.path}' is a {type(m).__name__}; use reads='output'."
            )

    def forward(self, x: Tensor, base: Base, call: tuple[tuple, dict[str, Any]] = ((), {})) -> Any:
        m, residual = self.site.module, []
        hooks = []
        if self.post_norm:
            residual.append(call[0][0] if call[0] else call[1]["input_tensor"])
            norm, part = m.LayerNorm, m.dense
        else:
            norm, part = nn.Identity(), m.mlp
            hooks.append(m.post_attention_layernorm.register_forward_pre_hook(lambda _, args: residual.append(args[0])))

        def add(module: nn.Module, args: tuple, h: Tensor) -> Tensor:
            read = residual[-1] if self.alone else norm(h + residual[-1])
            return h + self.added(read.to(self.dtype)).to(h.dtype)

        hooks.append(part.register_forward_hook(add))
        try:
            return base(x)
        finally:
            for hook in hooks:
                hook.remove()
