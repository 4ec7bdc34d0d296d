"""KaSA: Knowledge-aware Singular-value Adaptation (Wang et al., 2024, arXiv:2412.06071).

    W' = W_cut + s B diag(d) A        W_cut = W without its r smallest singular triplets; d (r,) starts at N(0, 1)

The loss gains beta sum d^2 + gamma (||A A^T - I||_F + ||B^T B - I||_F) at each layer. W_cut stands in for W while the
adapter is active; off is the true W. Cost: as LoRA, plus one decomposition of W at the start.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.core.sites import Site
from veneer.methods.lora import Factors, Lora, LoraConfig, LoraEmbedding, LoraWeight
from veneer.ops.factor import SVD, bottom_svd


@Lora.variant("kasa_config")
class Kasa(Lora):
    """LoRA with a diagonal between its factors, over a weight that lost its least components."""

    zero_start = False

    def __init__(self, site: Site, config: LoraConfig):
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"KaSA moves the base weight itself, so init_lora_weights='{config.init_lora_weights}' cannot be added."
            )
        super().__init__(site, config)
        self.beta, self.gamma = config.kasa_config.beta, config.kasa_config.gamma  # type: ignore[union-attr]
        self.lora_diag = nn.Parameter(torch.randn(super().factors()[0].shape[0]))

    def factors(self) -> Factors:
        a, b = super().factors()
        d = self._parameters.get("lora_diag")
        return (a, b) if d is None else (a * d.reshape(-1, *[1] * (a.dim() - 1)), b)

    # ---- the base without its least components ----------------------------------------------------------------------
    def _least(self) -> list[SVD]:
        """The r smallest triplets of each of the weight's matrices."""
        a, b = self.matrices()
        r, rows, columns = a.shape[-2], b.shape[-2], a.shape[-1]
        if r >= min(rows, columns):
            raise ValueError(
                f"KaSA takes the {r} smallest of the {min(rows, columns)} singular values of '{self.site.path}' out, "
                "which leaves nothing; lower r."
            )
        return [bottom_svd(w, r) for w in self.site.weight.detach().reshape(-1, rows, columns)]

    @torch.no_grad()
    def ready(self) -> None:
        weight = self.site.weight.detach()
        if weight.is_meta or self.residual is not None:
            return
        cut = torch.stack([(u * s) @ v.T for u, s, v in self._least()]).reshape(weight.shape)
        self.rebase((weight.to(cut) - cut).to(weight.dtype))

    def delta_factors(self) -> Factors:
        """Against the original base, what was taken out counts as well."""
        a, b = self.matrices()
        least = self._least()
        out = torch.stack([u * s for u, s, _ in least]).reshape(*b.shape)
        back = torch.stack([v.T for _, _, v in least]).reshape(*a.shape)
        return torch.cat([self.scaling * b, -out.to(b)], dim=-1), torch.cat([a, back.to(a)], dim=-2)

    def penalty(self) -> Tensor:
        a, b = super().factors()
        a, b = super().matrices((a, b))
        one = torch.eye(a.shape[-2], device=a.device)
        off = torch.linalg.matrix_norm(a.float() @ a.float().mT - one).sum()
        off = off + torch.linalg.matrix_norm(b.float().mT @ b.float() - one).sum()
        return self.beta * self.lora_diag.float().square().sum() + self.gamma * off


class KasaEmbedding(Kasa, LoraEmbedding):
    """KaSA on an embedding."""


class KasaWeight(Kasa, LoraWeight):
    """KaSA on a bare parameter or a stack of experts."""


Kasa.embedding, Kasa.parameter = KasaEmbedding, KasaWeight
