"""MonteCLoRA: Monte Carlo enhanced LoRA (Sengupta et al., 2024, arXiv:2411.04358).

    training    A~ = A + e sum_k w_k Z_k    Z_k (r, in), rows N(0, S_ii);  S ~ Wishart(r, diag(exp sigma)^2) / r
                                           w ~ Dirichlet(exp c), by its logistic-normal approximation
    otherwise   A~ = A

sigma (r,) and c (K,) are trained, e is small (1e-4). The loss gains, averaged over layers, the KL divergences of the
Dirichlet, the Wishart and the Gaussian from their priors times kl_loss_weight. Given w, the weighted sum of K Gaussians
is one Gaussian of variance sum w_k^2, so one is drawn. Cost beside LoRA: r in random numbers a training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.core.sites import Site
from veneer.methods.lora import Factors, Lora, LoraConfig, LoraEmbedding
from veneer.methods.lora_options import MontecloraConfig


class Sampler(nn.Module):
    """The trained distribution of the noise on one A, under the peer's names."""

    def __init__(self, rank: int, config: MontecloraConfig):
        super().__init__()
        self.config = config
        self.std_prior = nn.Parameter(torch.rand(rank))
        self.expert_weights_prior = nn.Parameter(torch.rand(config.num_samples))
        self.register_buffer("gaussian_var_prior", torch.eye(rank))
        self.register_buffer("expert_weights", torch.full((config.num_samples,), 1.0 / config.num_samples))

    def forward(self, columns: int) -> Tensor:
        """e sum_k w_k Z_k, (r, columns)."""
        variance, w = self._variances(), self._weights()
        self.expert_weights.copy_(w.detach())
        noise = torch.randn(len(variance), columns, device=w.device, dtype=w.dtype)
        return self.config.sample_scaler * w.square().sum().sqrt() * variance.sqrt().unsqueeze(1) * noise

    def _variances(self) -> Tensor:
        """The diagonal of a Wishart sample over its degrees of freedom, by Bartlett's decomposition: (r,)."""
        r = self.std_prior.shape[0]
        chi = torch.stack([torch.randn(r - i, device=self.std_prior.device).square().sum() for i in range(r)]).sqrt()
        lower = torch.tril(torch.randn(r, r, device=chi.device), -1) + torch.diag(chi)
        return (self.std_prior.exp().unsqueeze(1) * lower.to(self.std_prior)).square().sum(1) / r

    def _weights(self) -> Tensor:
        """A sample of Dirichlet(alpha) through the normal that Laplace's approximation gives its logits: (K,)."""
        alpha = self.expert_weights_prior.exp()
        k = alpha.shape[0]
        mean = alpha.log() - alpha.log().mean()
        variance = (1 - 2 / k) / alpha + (1 / alpha).sum() / k**2
        return torch.softmax(mean + variance.clamp_min(0).sqrt() * torch.randn_like(mean), 0)

    def divergence(self) -> Tensor:
        """kl_loss_weight times KL of the Dirichlet, the Wishart and the Gaussian, less the entropy where asked for."""
        alpha = self.expert_weights_prior.float().exp()
        dirichlet = torch.distributions.Dirichlet(alpha, validate_args=False)
        prior = torch.distributions.Dirichlet(torch.full_like(alpha, self.config.dirichlet_prior), validate_args=False)
        kl = torch.distributions.kl_divergence(dirichlet, prior)
        scale = (2 * self.std_prior.float()).exp()  # the diagonal of the Wishart's scale matrix and of its mean
        r = scale.shape[0]
        gauss = 0.5 * (scale - 1 - scale.log()).sum()  # KL(N(0, S) || N(0, I)) at the mean S
        kl = kl + r * gauss + gauss  # KL of two Wisharts with r degrees of freedom is r times that
        if self.config.use_entropy:
            kl = kl - dirichlet.entropy()
        return self.config.kl_loss_weight * kl


class Layers(nn.Module):
    """The number of layers that the divergences are averaged over."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count


@Lora.variant("monteclora_config")
class Monteclora(Lora):
    """LoRA whose A is noisy in training, with a trained distribution of the noise."""

    def __init__(self, site: Site, config: LoraConfig):
        super().__init__(site, config)
        a = super().factors()[0]
        self.lora_monteclora_sampler = Sampler(a.shape[0], config.monteclora_config)  # type: ignore[arg-type]

    @classmethod
    def plan(cls, config: LoraConfig, sites: Sequence[Site]) -> nn.Module:
        return Layers(len(sites))

    def factors(self) -> Factors:
        a, b = super().factors()
        if not self.training or "lora_monteclora_sampler" not in self._modules:
            return a, b
        return a + self.lora_monteclora_sampler(a[0].numel()).reshape(a.shape), b

    def delta_weight(self) -> Tensor:
        a, b = self.matrices(super().factors())
        return (self.scaling * (b @ a)).reshape(self.site.shape)

    def penalty(self) -> Tensor:
        return self.lora_monteclora_sampler.divergence() / self.shared.count  # type: ignore[union-attr,operator]


class MontecloraEmbedding(Monteclora, LoraEmbedding):
    """MonteCLoRA on an embedding."""


Monteclora.embedding = MontecloraEmbedding
