"""A place where adapters may sit: any base layer, shown as one linear map ``(out, in, *kernel)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from veneer.core import lean, quant

Parameters = dict[str, nn.Parameter | None]
"""Parameter name -> object, as taken out of or put into a layer."""


class Site:
    """One base layer as adapters see it. A plain object: it registers nothing and owns no tensor.

    Attributes:
        path: the layer's name in the base model, before anything was wrapped.
        module: the base layer itself.
        parameter: the name of the bare parameter this site is about, else None.
        inputs: what the current call's inputs said (``attention_mask``, ``task_ids``, ...), shared by a model's sites.
        maps_input: False where only the weight can be reached, never the input.
        below: what the disk key says between the layer's place and the adapter's own keys.
    """

    kind: ClassVar[str] = "abstract"
    maps_input: ClassVar[bool] = True
    first: ClassVar[str] = "input"
    cut: ClassVar[bool] = False
    """Whether the layer's weight is divided between processes that work on the same rows."""
    stack: int | None = None
    """Number of matrices, for a site whose weight is a stack ``(stack, out, in)`` (fused experts)."""
    parameter: Any = None
    below: str = ""
    batch_dim: int = 0
    """The dimension of the layer's input that counts the rows of a batch."""
    in_features: int
    out_features: int

    def __init__(self, path: str, module: Any):
        self.path, self.module = path, module
        self.inputs: dict[str, Any] = {}

    if TYPE_CHECKING:  # kinds add attributes of their own

        def __getattr__(self, name: str) -> Any: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, in={self.in_features}, out={self.out_features})"

    # ---- the linear map ---------------------------------------------------------------------------------------------
    kernel: tuple[int, ...] = ()
    """Kernel size of a convolution, else ()."""

    @property
    def stored(self) -> Tensor:
        """The weight as the layer stores it (packed, turned, sharded)."""
        return quant.stored(self.module)

    @property
    def weight(self) -> Tensor:
        """The weight as ``(out, in, *kernel)``, dequantised."""
        return quant.dense(self.module, self.stored)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of ``weight``, without touching it."""
        return (self.out_features, self.in_features, *self.kernel)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return quant.execution_device(self.module, self.stored)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in."""
        return quant.compute_dtype(self.module, self.stored)

    @property
    def scale(self) -> Tensor | float:
        """A factor that the layer multiplies its output by (Gemma's scaled embedding), else 1."""
        return 1.0

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's own function of ``x``, with another weight ``(out, in, *kernel)`` and bias."""
        raise NotImplementedError

    def need_linear(self, does: str) -> None:
        """Refuse a place that is no linear layer with an input in reach, for a method that ``does`` a thing to it.

        Raises:
            ValueError: another kind of layer.
        """
        if self.kind not in ("linear", "conv1d_hf") or not self.maps_input:
            raise ValueError(f"{does} a linear layer, which '{self.path}' ({self.kind}) is not; exclude it.")

    def factors(self, rank: int) -> tuple[nn.Module, nn.Module]:
        """Two fresh, bias-free layers ``in -> rank -> out`` whose composition is a low-rank version of this layer."""
        raise NotImplementedError(f"{type(self).__name__} '{self.path}' has no low-rank factors.")

    # ---- editing, on record -----------------------------------------------------------------------------------------
    def _names(self) -> tuple[str, str | None]:
        return "weight", "bias" if self.bias is not None else None

    def _stored_form(self, weight: Tensor) -> Tensor:
        return weight

    def swap(self, weight: Tensor, bias: Tensor | None, dense: bool = False) -> Parameters:
        """Put in new parameters holding ``weight`` and ``bias``; returns the old objects for ``put``.

        Args:
            weight: (out, in, *kernel).
            bias: (out,), or None.
            dense: as a float parameter, even where the layer's own form is a packed one.

        Raises:
            ValueError: the layer's tensors are parked elsewhere and would overwrite the new ones at the next call, or
                its packed form cannot be made.
        """
        if quant.offloaded(self.module) is not None:
            raise ValueError(
                f"'{self.path}' is offloaded, so a merged weight would be lost at its next call; load the model "
                "without offloading to merge."
            )
        name, bias_name = self._names()
        form = self._stored_form(weight)
        new = {name: nn.Parameter(form, requires_grad=False)} if dense else quant.packed(self.module, name, form)
        if bias_name is not None or bias is not None:
            new[bias_name or "bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return self.put(new)

    def put(self, parameters: Parameters) -> Parameters:
        """Put the given parameter objects in; returns the ones that were there."""
        quant.released(self.module)
        old: Parameters = {}
        for name, value in parameters.items():
            owner, leaf = self._owner(name)
            old[name] = getattr(owner, leaf, None)
            if value is not None and leaf not in owner._parameters:
                owner.register_parameter(leaf, value)
            owner._parameters[leaf] = value
        return old

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.module.get_submodule(path), leaf

    def packed(self, weight: Tensor) -> Parameters:
        """Parameter objects that hold ``weight`` in this layer's own form and dtype, not put in yet."""
        return quant.packed(self.module, self._names()[0], self._stored_form(weight).to(self.dtype))


class LinearSite(Site):
    """``nn.Linear`` and whatever acts like it, quantised kinds included."""

    kind = "linear"

    def __init__(self, path: str, module: Any, turned: bool = False):
        super().__init__(path, module)
        self.turned = turned
        self.in_features, self.out_features = module.in_features, module.out_features
        if turned:
            self.out_features, self.in_features = self.stored.shape[1], self.stored.shape[0]

    @property
    def weight(self) -> Tensor:
        weight = quant.dense(self.module, self.stored)
        return weight.T if self.turned else weight

    def _stored_form(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous() if self.turned else weight

    def __call__(self, x, weight, bias=None, *args, **kwargs):
        return F.linear(x, weight, bias)

    def factors(self, rank):
        return lean.linear(self.in_features, rank), lean.linear(rank, self.out_features)


class Conv1DSite(LinearSite):
    """transformers' ``Conv1D``: a linear layer that stores its weight turned, ``(in, out)``."""

    kind = "conv1d_hf"
    first = "x"

    def __init__(self, path: str, module: Any):
        Site.__init__(self, path, module)
        self.turned = True
        self.in_features, self.out_features = module.weight.shape


class ConvSite(Site):
    """``nn.Conv1d``, ``Conv2d``, ``Conv3d`` with any kernel, stride, padding, padding mode, dilation and groups.

    ``weight`` is ``(out, in / groups, *kernel)`` as torch has it; ``in_features`` counts ``in / groups``.
    """

    kind = "conv"

    def __init__(self, path: str, module: Any):
        super().__init__(path, module)
        self.in_features = module.in_channels // module.groups
        self.out_features = module.out_channels
        self.kernel = tuple(module.kernel_size)
        self.groups = module.groups

    @property
    def dims(self) -> int:
        return len(self.kernel)

    def __call__(self, x, weight, bias=None, *args, **kwargs):
        return self.module._conv_forward(x, weight, bias)

    def factors(self, rank):
        """Down: this layer's own geometry to ``rank`` channels; up: 1x1. Each group has its own factors."""
        conv, m = type(self.module), self.module
        plain = (
            {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[self.dims]
            if conv.__module__ != "torch.nn.modules.conv"
            else conv
        )
        if m.groups > 1 and rank % m.groups:
            groups = 1
        else:
            groups = m.groups
        down = plain(
            m.in_channels, rank, m.kernel_size, m.stride, m.padding, m.dilation, m.groups if groups > 1 else 1,
            bias=False, padding_mode=m.padding_mode,
        )  # fmt: skip
        up = plain(rank, m.out_channels, (1,) * self.dims, groups=groups, bias=False)
        return down, up


class EmbeddingSite(Site):
    """``nn.Embedding``: a linear map of one-hot ids, so ``in`` is the vocabulary and the stored weight is turned."""

    kind = "embedding"

    def __init__(self, path: str, module: Any):
        super().__init__(path, module)
        self.in_features, self.out_features = module.num_embeddings, module.embedding_dim

    @property
    def weight(self) -> Tensor:
        return quant.dense(self.module, self.stored).T

    @property
    def bias(self) -> None:
        return None

    def _stored_form(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous()

    def swap(self, weight: Tensor, bias: Tensor | None) -> Parameters:
        if self.module.max_norm is not None:
            raise ValueError(
                f"'{self.path}' bounds the norm of its rows at each call (max_norm), which would change a merged "
                "weight; keep the adapter unmerged."
            )
        return super().swap(weight, bias)

    @property
    def scale(self) -> Tensor | float:
        scale = getattr(self.module, "embed_scale", None)
        return 1.0 if scale is None else scale

    def lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Rows of a table ``(vocab, n)`` for ``ids``, without the layer's scale or norm bound."""
        m = self.module
        return F.embedding(ids, rows, m.padding_idx, sparse=m.sparse, scale_grad_by_freq=m.scale_grad_by_freq)

    def __call__(self, x, weight, bias=None, *args, **kwargs):
        y = self.lookup(x, weight.T)
        return y if isinstance(self.scale, float) else y * self.scale.to(y.dtype)


class WeightSite(Site):
    """A bare parameter of any module: ``(out, in)``, or a stack ``(stack, out, in)`` of fused experts.

    Only the weight can be reached, so an adapter needs ``merged``; the engine runs the module with it.
    """

    kind = "parameter"
    maps_input = False

    def __init__(self, path: str, module: Any, parameter: str, bias: str | None = None, below: str = ""):
        super().__init__(path, module)
        self.parameter, self.bias_name, self.below = parameter, bias, below
        shape = self.stored.shape
        if not self.stored.is_floating_point() or quant.backend(module) is not None and parameter == "weight":
            raise ValueError(
                f"Parameter '{parameter}' of '{path}' is packed ({self.stored.dtype}); name the layer in "
                "target_modules instead."
            )
        if len(shape) not in (2, 3):
            raise ValueError(
                f"Parameter '{parameter}' of '{path}' has shape {tuple(shape)}; only 2-D matrices and 3-D stacks "
                "(experts, out, in) can be adapted."
            )
        self.turned = bool(getattr(module, "is_transposed", False)) and len(shape) == 3
        self.stack = shape[0] if len(shape) == 3 else None
        self.out_features, self.in_features = shape[-2:] if not self.turned else (shape[-1], shape[-2])

    @property
    def stored(self) -> Tensor:
        owner, leaf = self._owner(self.parameter)
        return getattr(owner, leaf)

    @property
    def weight(self) -> Tensor:
        return self.stored.transpose(-1, -2) if self.turned else self.stored

    @property
    def bias(self) -> Tensor | None:
        if self.bias_name is None:
            return None
        owner, leaf = self._owner(self.bias_name)
        return getattr(owner, leaf, None)

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*((self.stack,) if self.stack else ()), self.out_features, self.in_features)

    def _names(self):
        return self.parameter, self.bias_name if self.bias is not None else None

    def _stored_form(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).contiguous() if self.turned else weight

    def replaced(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """parameter name -> tensor, for ``functional_call`` on the module."""
        name, bias_name = self._names()
        out = {name: weight.transpose(-1, -2) if self.turned else weight}
        if bias_name is not None and bias is not None:
            out[bias_name] = bias
        return out

    def one(self, index: int) -> Site:
        """The ``index``-th matrix of the stack as a site of its own (for building adapters; it cannot be called)."""
        return _Slice(self, index)

    def __call__(self, x, weight, bias=None, *args, **kwargs):
        return functional_call(self.module, self.replaced(weight, bias), (x, *args), kwargs)

    def factors(self, rank):
        return lean.linear(self.in_features, rank), lean.linear(rank, self.out_features)


class _Slice(Site):
    """One matrix of a stack: what an adapter of a single expert looks at."""

    kind = "linear"
    maps_input = False

    def __init__(self, whole: WeightSite, index: int):
        super().__init__(f"{whole.path}.{whole.parameter}.{index}", whole.module)
        self.whole, self.index = whole, index
        self.in_features, self.out_features = whole.in_features, whole.out_features

    @property
    def stored(self) -> Tensor:
        return self.whole.stored[self.index]

    @property
    def weight(self) -> Tensor:
        return self.whole.weight[self.index]

    @property
    def bias(self) -> None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def __call__(self, x, weight, bias=None, *args, **kwargs):
        return F.linear(x, weight, bias)

    def factors(self, rank):
        return lean.linear(self.in_features, rank), lean.linear(rank, self.out_features)


class OpaqueSite(Site):
    """Any module as it is: adapters may stand around it, or run a copy of it; it shows no matrix."""

    kind = "opaque"

    def __init__(self, path: str, module: Any):
        super().__init__(path, module)
        weight = next((p for p in module.parameters(recurse=True)), None)
        sizes = getattr(module, "normalized_shape", None) or (tuple(weight.shape) if weight is not None else (0,))
        self.in_features = self.out_features = int(sizes[-1]) if len(sizes) else 0
        self.first = _first_argument(module)

    @property
    def stored(self) -> Tensor:
        lead = next(self.module.parameters(), None)
        return torch.empty(0) if lead is None else lead

    @property
    def weight(self) -> Tensor:
        raise ValueError(f"'{self.path}' ({type(self.module).__name__}) shows no weight matrix.")

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.stored.dtype
        return dtype if dtype.is_floating_point else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def __call__(self, x, weight, bias=None, *args, **kwargs):
        return functional_call(self.module, weight, (x, *args), kwargs)


def _first_argument(module: nn.Module) -> str:
    names = module.forward.__code__.co_varnames if hasattr(module.forward, "__code__") else ()
    return names[1] if len(names) > 1 and module.forward.__code__.co_argcount > 1 else "input"


RECOGNISED: list[Callable[[str, nn.Module], list[Site]]] = []
"""Further kinds of layers: each gives a module's sites, or none for what it does not know."""


def sites_for(path: str, module: nn.Module, parameter: str | None = None, fan_in_fan_out: bool = False) -> list[Site]:
    """The sites of a layer: one, or two for ``nn.MultiheadAttention`` (innermost first).

    Returns an empty list for a module that shows no linear map (use ``OpaqueSite`` there on purpose).
    """
    if parameter is not None:
        return [WeightSite(path, module, parameter)]
    for recognise in RECOGNISED:
        if found := recognise(path, module):
            return found
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            raise ValueError(
                f"'{path}' is a MultiheadAttention whose keys or values have another width (kdim, vdim); name its "
                "q_proj_weight, k_proj_weight and v_proj_weight in target_parameters instead."
            )
        pair: list[Site] = [
            WeightSite(path, module, "out_proj.weight", "out_proj.bias", below="out_proj"),
            WeightSite(path, module, "in_proj_weight", "in_proj_bias"),
        ]
        for site in pair:
            site.batch_dim = 0 if module.batch_first else 1
        return pair
    if isinstance(module, nn.Embedding):
        return [EmbeddingSite(path, module)]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return [ConvSite(path, module)]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return [Conv1DSite(path, module)]
    if isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and not isinstance(module, nn.Bilinear)
    ):
        return [LinearSite(path, module, turned=fan_in_fan_out and quant.backend(module) is None)]
    return []
