"""GLoRA: Generalized LoRA (Chavan et al., 2023, arXiv:2306.07967).

    W' = W + W * A + B,     b' = b + b * D + E + W C

Each of A, B (out, in), C (in,), D, E (out,) is low-rank, a vector, one number, or absent. All start at zero. D, E and C
act on a bias, so a layer without one has A and B alone. Cost: 4 r in out FLOPs a step to reweight, then the layer's
own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Reweight, Weight
from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import columns

FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


@dataclass
class GloraConfig(LayerConfig):
    """Settings of GLoRA: the form of each support.

    Attributes:
        r: rank of the supports that are low-rank.
        config_A_B: form of A and B: "lora", "vector", "constant" or "none".
        config_C: form of C: "lora", "vector" or "none".
        config_D_E: form of D and E: "vector", "constant" or "none".
        init_weights: True starts as the base model, False at random values.

    Raises:
        ValueError: a form that a support cannot have.
    """

    r: int = 8
    bias: str = "none"
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    type: ClassVar[str | None] = "GLORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in FORMS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Invalid {name} '{getattr(self, name)}'; valid are {', '.join(known)}.")

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.r <= 0:
            raise ValueError(f"`r` should be a positive integer value but the value passed is {self.r}.")


@method("GLORA", GloraConfig)
class Glora(Reweight):
    """A weight and bias, each scaled and shifted."""

    dense = True

    def __init__(self, site: Site, config: GloraConfig):
        super().__init__(site, config)
        out, k, r = site.out_features, columns(site), config.r
        forms = {"A": (config.config_A_B, out, k), "B": (config.config_A_B, out, k)}
        if site.bias is not None:
            forms |= {"C": (config.config_C, k, 1), "D": (config.config_D_E, out), "E": (config.config_D_E, out)}  # type: ignore[dict-item]
        for name, (form, *shape) in forms.items():
            if form != "none":
                self.add_module(f"glora_{name}", support(form, tuple(shape), r, config.init_weights))
        if not list(self.parameters()):
            raise ValueError(
                f"GLoRA has nothing to train at '{site.path}': config_A_B is 'none', and the supports C, D and E need "
                "a bias that is to be changed; choose another form or exclude the layer."
            )

    # A file spells absent supports out as zeros.
    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out, k = self.site.out_features, columns(self.site)
        shapes = {"A": (out, k), "B": (out, k), "C": (k, 1), "D": (out,), "E": (out,)}
        absent = {name: shape for name, shape in shapes.items() if f"glora_{name}" not in self._modules}
        return tensors | {f"glora_{name}.zeros": torch.zeros(shape) for name, shape in absent.items()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if not key.endswith(".zeros")}

    def value(self, name: str, like: Tensor) -> Tensor | float:
        """One support, ready to broadcast, or 0."""
        parts = self._modules.get(f"glora_{name}")
        if parts is None:
            return 0.0
        return (parts["Xd"] @ parts["Xu"] if "Xd" in parts else parts["X"]).to(like)  # type: ignore[index,operator]

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        w = weight.flatten(1)
        if bias is not None:
            c = self.value("C", w)
            wc = (w @ c).flatten() if isinstance(c, Tensor) else 0.0
            bias = bias + bias * self.value("D", w) + self.value("E", w) + wc
        return (w + w * self.value("A", w) + self.value("B", w)).view_as(weight), bias


def support(form: str, shape: tuple[int, ...], r: int, zero: bool) -> nn.ParameterDict:
    """The tensors of one support: zero at the start, or random."""
    if form == "lora":
        xd, xu = torch.zeros(shape[0], r), torch.empty(r, shape[1])
        nn.init.kaiming_uniform_(xu, a=math.sqrt(5))
        if not zero:
            nn.init.kaiming_uniform_(xd, a=math.sqrt(5))
        return nn.ParameterDict({"Xd": xd, "Xu": xu})
    size = (1,) if form == "constant" else (shape[0], 1) if len(shape) == 2 else shape
    return nn.ParameterDict({"X": torch.zeros(size) if zero else 0.1 * torch.randn(size)})
