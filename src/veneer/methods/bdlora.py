"""BD-LoRA: Block-Diagonal LoRA for tensor-parallel serving (2025, arXiv:2510.23346).

    W' = W + s B A        A = diag(A_1 ... A_n), A_i (r/n, in/n), or B = diag(B_1 ... B_n), B_i (out/n, r/n)

n is the degree of tensor parallelism: with B in blocks where a layer is split by columns (q, k, v, gate, up) and A in
blocks where it is split by rows (o, down), no device needs another's half of the product. Blocks are stored below each
other: A (r, in/n), B (out, r/n). Cost: as LoRA, of whose factors one is n times smaller.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.core.patterns import search_suffix
from veneer.core.sites import Site
from veneer.methods.lora import Factors, Lora, LoraConfig


@Lora.variant("use_bdlora")
class BdLora(Lora):
    """LoRA one of whose factors is block-diagonal, by the layer's name."""

    def make_factors(self, site: Site, config: LoraConfig) -> None:
        if site.kernel:
            raise ValueError(f"BD-LoRA is defined for linear layers, which the convolution '{site.path}' is not.")
        super().make_factors(site, config)
        how = config.use_bdlora
        in_a = any(search_suffix(key, site.path) for key in how.target_modules_bd_a or ())  # type: ignore[union-attr]
        in_b = any(search_suffix(key, site.path) for key in how.target_modules_bd_b or ())  # type: ignore[union-attr]
        if (in_a and in_b) or (how.match_strict and not (in_a or in_b)):  # type: ignore[union-attr]
            raise ValueError(
                f"'{site.path}' is named by {'both' if in_a else 'neither'} of target_modules_bd_a and "
                "target_modules_bd_b; name it in one of them, or set match_strict=False for plain LoRA elsewhere."
            )
        self.blocks = how.nblocks  # type: ignore[union-attr]
        self.blocked = "A" if in_a else "B" if in_b else None
        rows, columns = (config.r, site.in_features) if in_a else (site.out_features, config.r)
        if self.blocked and (rows % self.blocks or columns % self.blocks):
            raise ValueError(
                f"lora_{self.blocked} at '{site.path}' is ({rows}, {columns}), which {self.blocks} blocks do not "
                "divide; choose another nblocks or r."
            )
        if self.blocked:
            part = self.lora_A if in_a else self.lora_B
            part.weight = nn.Parameter(part.weight.new_empty(rows, columns // self.blocks))

    def factors(self) -> Factors:
        a, b = super().factors()
        if self.blocked == "A":
            return torch.block_diag(*a.chunk(self.blocks)), b
        return (a, torch.block_diag(*b.chunk(self.blocks))) if self.blocked == "B" else (a, b)

    def branch(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        a, b = super().factors()
        if self.blocked is None:
            return super().branch(x, dropout)
        h = torch.nn.functional.dropout(x, dropout) if dropout else x
        h = self._by_blocks(h, a) if self.blocked == "A" else h @ a.T
        y = self._by_blocks(h, b) if self.blocked == "B" else h @ b.T
        bias = self.lora_B.bias
        return (y if bias is None else y + bias) * self.scaling

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors, bias = super().incoming(tensors), self.lora_B.bias
        if self.blocked == "B" and bias is not None and tensors and "lora_B.bias" not in tensors:
            return tensors | {"lora_B.bias": torch.zeros_like(bias)}  # the peer has no bias on a B in blocks
        return tensors

    def _by_blocks(self, x: Tensor, blocks: Tensor) -> Tensor:
        """``x diag(M_1 ... M_n)^T`` for M_i below each other: (..., columns) -> (..., rows)."""
        m = blocks.unflatten(0, (self.blocks, -1))  # (n, rows / n, columns / n)
        return torch.einsum("...nc,nrc->...nr", x.unflatten(-1, (self.blocks, -1)), m).flatten(-2)
