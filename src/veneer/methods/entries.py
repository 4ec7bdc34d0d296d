"""What methods share whose change is decided by n trained entries, in their places or in a transform's domain."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.core.adapter import Additive, made_again
from veneer.core.cache import cached
from veneer.methods.sides import columns
from veneer.ops.entries import FEW, at_entries, linear_by_entries, turned


class Entries(Additive):
    """A change that is linear in some entries: in their places in the weight, unless a method transforms them.

    A method has ``places``, and writes ``values``, and for a transform ``matrix`` and its adjoint ``gradient``. A
    training step runs the layer once, with W + dW; where entries are few, each gets its own gradient.
    """

    dense = True

    places: Tensor
    """Where the entries are, (2, n) in the weight, or in the transform, as a matrix."""

    def values(self) -> Tensor:
        """What they are, (n,)."""
        raise NotImplementedError

    def entries(self, values: Tensor) -> Tensor:
        """The entries in their places, (out, in prod(kernel))."""
        empty = values.new_zeros(self.site.out_features, columns(self.site))
        return empty.index_put(tuple(self.places.long()), values)

    def matrix(self, values: Tensor) -> Tensor:
        """The change as a matrix, (out, in prod(kernel))."""
        return self.entries(values)

    def gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """The gradient of the entries, (n,), of outputs' gradients (N, out) and inputs (N, in) of a linear layer."""
        return at_entries(turned(g), turned(x), *self.places)

    def decided(self) -> Tensor:
        """The change that the entries make, shaped like the weight."""
        return self.matrix(self.values()).reshape(self.site.shape)

    def delta_weight(self) -> Tensor:
        return self.decided()

    def delta(self, x: Tensor) -> Tensor:
        return self.site(x, cached(self, "delta", self.decided))

    def summed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = self.values()
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        few = FEW * len(values) < weight.numel() and self.site.kind in ("linear", "conv1d_hf")
        if few and not trains and not torch.is_autocast_enabled(x.device.type):
            return linear_by_entries(x, weight, bias, values, self.matrix, self.gradient, self.again)

        def run(x: Tensor) -> Tensor:
            return self.site(x, weight + self.decided().to(weight), bias)

        return made_again(run, x, weight, values) if self.again else run(x)
