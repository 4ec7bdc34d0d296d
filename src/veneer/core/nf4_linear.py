"""A linear layer that stores its weight in NF4, in pure PyTorch, and a model whose linear layers are such ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.ops.nf4 import BLOCK
from veneer.ops.nf4_bytes import Layout, packed, product, unpacked


class Nf4Linear(nn.Module):
    """``y = x deq(weight)^T + bias``: 4.127 bits a weight with double quantisation, 4.5 without.

    It computes in the dtype of its input, unpacks the weight in the forward pass and again in the backward pass, and
    keeps neither the dense weight nor its input for the latter.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is a bias; it stays a float.
        block: weights that share a constant.
        double_quant: quantise the constants as well.
        dtype: the dtype the layer computes in where its input does not say.

    Attributes:
        weight: uint8 (bytes, 1), constants included.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block: int = BLOCK,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = Layout((out_features, in_features), block, double_quant)
        self.compute_dtype = dtype or torch.get_default_dtype()
        empty = torch.zeros(sum(self.layout.parts), 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        zeros = torch.zeros(out_features, dtype=self.compute_dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros, requires_grad=False)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, block: int = BLOCK, double_quant: bool = True) -> Nf4Linear:
        """The layer that holds ``weight`` (out, in), quantised, and ``bias`` as it is."""
        out, inside = weight.shape
        layer = cls(inside, out, False, block, double_quant, device="meta", dtype=weight.dtype)
        layer.weight = layer.pack(weight)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def pack(self, weight: Tensor) -> nn.Parameter:
        """``weight`` (out, in) as this layer would store it."""
        return nn.Parameter(packed(weight.detach(), self.layout), requires_grad=False)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in)."""
        return unpacked(self.weight, self.layout, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return product(x, self.weight, None if self.bias is None else self.bias.to(x.dtype), self.layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block={layout.block}, double_quant={layout.double}"
        )


def quantize_model(
    model: Any, how: str = "nf4", *, skip: Sequence[str] = (), block: int = BLOCK, double_quant: bool = True
) -> Any:
    """Put the weights of a model's linear layers into NF4, in place, one layer at a time.

    The output embedding stays as it is, and so does everything that shares its weight with another module, or that has
    an adapter around it (``veneer.hf.quantised_start`` takes those).

    Args:
        model: any model; a dense layer is freed as soon as its packed form is in its place. On the meta device only
            the shapes are made, for ``load_state_dict``.
        how: "nf4".
        skip: names of further modules to leave alone, as whole paths, last parts, or the start of a path.
        block: weights that share a constant.
        double_quant: quantise the constants as well.

    Returns:
        The model (a new object only where the model itself is one linear layer).

    Raises:
        ValueError: another ``how``, or no layer to quantise.
    """
    if how != "nf4":
        raise ValueError(
            f"quantize_model knows 'nf4', not '{how}'; other formats are made by their own libraries while loading."
        )
    paths = _paths(model, skip)
    if not paths:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise{' besides skip' if skip else ''}.")
    for path in paths:
        layer = nf4_layer(model.get_submodule(path), block, double_quant)
        if not path:
            return layer
        model.set_submodule(path, layer)
    if hasattr(model, "config"):
        model.is_quantized, model.is_loaded_in_4bit = True, True
    return model


def nf4_layer(module: Any, block: int = BLOCK, double_quant: bool = True) -> Nf4Linear:
    """One linear layer (or transformers' Conv1D) as an ``Nf4Linear``, in the same mode."""
    weight = module.weight.detach().T if hasattr(module, "nf") else module.weight.detach()
    if weight.device.type == "meta":
        out, inside = weight.shape
        layer = Nf4Linear(inside, out, module.bias is not None, block, double_quant, "meta", weight.dtype)
    else:
        layer = Nf4Linear.of(weight, module.bias, block, double_quant)
    return layer.train(module.training)


def _paths(model: Any, skip: Sequence[str]) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = {id(m) for host in model.modules() if getattr(type(host), "is_adapted", False) for m in host.modules()}
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)

    def takes(path: str, module: Any) -> bool:
        if type(module) is not nn.Linear and not (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
            return False
        if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
            return False
        if any(path == s or path.endswith(f".{s}") or path.startswith(f"{s}.") for s in skip):
            return False
        return module is not head and id(module) not in adapted and held[id(module.weight)] == 1

    return [path for path, module in model.named_modules() if takes(path, module)]
