"""VB-LoRA: Vector Bank based LoRA (Li, Han, Ji, 2024, arXiv:2405.15179).

    W' = W + B A        each stretch of v entries of a row of A and of a column of B is  sum_{top-k} softmax(z)_i bank_i

The bank (h, v) is one for all layers; a layer trains the logits z: A's (r, in/v, h), B's (out/v, r, h). The bank starts
uniform and the logits normal, so the start is not the base model. Cost: 2 N r (in + out) FLOPs for N tokens, and
2 r k (in + out) a step to put A and B together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.sides import Factored, columns, input_dropout


@dataclass
class VBLoRAConfig(LayerConfig):
    """Settings of VB-LoRA. With ``save_only_topk_weights`` the file holds top-k indices and weights, for inference.

    Attributes:
        r: rank of B A.
        num_vectors: h, vectors in the bank.
        vector_length: v; must divide a layer's sides.
        topk: k.
        save_only_topk_weights: keep top-k indices and weights in the file, which can then not train on.
        vblora_dropout: dropout on what the change reads, in training.
        init_vector_bank_bound: the bank starts within this bound.
        init_logits_std: spread of the logits' start.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    type: ClassVar[str | None] = "VBLORA"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        for name in ("r", "topk", "vector_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)}.")
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} vectors cannot be chosen from a bank of {self.num_vectors}.")


class Bank(nn.Module):
    """The vectors that all layers mix."""

    def __init__(self, config: VBLoRAConfig):
        super().__init__()
        bank, bound = torch.empty(config.num_vectors, config.vector_length), config.init_vector_bank_bound
        self.vblora_vector_bank = nn.Parameter(bank.uniform_(-bound, bound))


@method("VBLORA", VBLoRAConfig)
class VBLoRA(Factored):
    """Low-rank factors made of stretches from the bank."""

    dropout = "vblora_dropout"

    zero_start = False

    @classmethod
    def plan(cls, config: VBLoRAConfig, sites: Sequence[Site]) -> Bank:
        return Bank(config)

    def __init__(self, site: Site, config: VBLoRAConfig):
        super().__init__(site, config)
        v, h = config.vector_length, config.num_vectors
        for what, size in (("inputs", columns(site)), ("outputs", site.out_features)):
            if size % v:
                raise ValueError(
                    f"VB-LoRA cuts the {size} {what} of '{site.path}' into stretches of vector_length={v}, which does "
                    "not divide them; choose a vector_length that does, or exclude the layer."
                )
        self.topk, self.only_topk = config.topk, config.save_only_topk_weights
        self.vblora_dropout = input_dropout(site, config.vblora_dropout, "vblora_dropout")
        shapes = {"A": (config.r, columns(site) // v, h), "B": (site.out_features // v, config.r, h)}
        for name, shape in shapes.items():
            logits = torch.randn(shape) * config.init_logits_std
            self.register_parameter(f"vblora_logits_{name}", nn.Parameter(logits))

    def mixed(self, logits: Tensor) -> Tensor:
        """(..., h) -> (..., v): the top-k of the bank, weighted by their softmax."""
        weights, chosen = logits.topk(self.topk, dim=-1)
        bank = self.shared.vblora_vector_bank
        return (weights.softmax(-1).unsqueeze(-1) * bank[chosen]).sum(-2)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r): dW = B A."""
        a = self.mixed(self.vblora_logits_A).flatten(1)
        return a, self.mixed(self.vblora_logits_B).mT.flatten(0, 1)  # (out/v, r, v) -> (out/v, v, r) -> (out, r)

    # ---- files that hold the chosen vectors alone -------------------------------------------------------------------
    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.only_topk:
            return tensors
        out = {}
        for name, logits in tensors.items():
            weights, chosen = logits.topk(self.topk, dim=-1)
            h = logits.shape[-1]
            small = torch.uint8 if h < 2**8 else torch.int16 if h < 2**15 else torch.int32
            out[f"{name}_topk_indices"] = chosen.to(small)
            out[f"{name}_topk_weights"] = weights.softmax(-1)[..., :-1]  # they sum to 1, so the last is known
        return out

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name in ("vblora_logits_A", "vblora_logits_B"):
            weights = tensors.get(f"{name}_topk_weights")
            if weights is None:
                continue
            chosen = tensors[f"{name}_topk_indices"].long()
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            out[name] = weights.new_full(getattr(self, name).shape, -torch.inf).scatter_(-1, chosen, weights.log())
        return out or tensors
