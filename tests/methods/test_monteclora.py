"""MonteCLoRA: deterministic outside training, the noise's law, the divergences, parity both ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laws.kinds import Chain
from methods.test_lora import base_of, inputs_of
from parity import both_ways, near, needs_peer, ours
from veneer import LoraConfig, MontecloraConfig


def monteclora(targets=("layer",), **settings) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), monteclora_config=MontecloraConfig(**settings))


def sampler_of(tuner):
    return next(iter(tuner.adapters("default")))[1].lora_monteclora_sampler


def test_evaluation_and_merging_are_plain_lora_and_training_is_noisy() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5), torch.randn(4, 7)
    tuner = ours(Chain(None, layer), monteclora(sample_scaler=0.1))
    adapter = next(iter(tuner.adapters("default")))[1]
    expected = layer(x) + 2.0 * x @ adapter.lora_A.weight.T @ adapter.lora_B.weight.T
    assert near(tuner(x), expected, 1e-6)
    tuner.train()
    first, second = tuner(x), tuner(x)
    assert not near(first, second, 1e-4)
    tuner.merge()  # also out of training mode, a merge has no noise
    assert near(tuner(x), expected, 1e-5)


def test_the_noise_has_mean_zero_and_its_trained_variance() -> None:
    torch.manual_seed(0)
    sampler = sampler_of(ours(Chain(None, nn.Linear(7, 5)), monteclora(sample_scaler=1.0, num_samples=4)))
    with torch.no_grad():
        sampler.std_prior.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        draws = [(sampler(40), sampler.expert_weights.clone()) for _ in range(1500)]
    noise = torch.stack([d for d, _ in draws])
    scale = torch.stack([w for _, w in draws]).square().sum(1).mean()
    assert noise.mean().abs() < 0.01
    expected = scale * torch.tensor([-2.0, 0.0, 2.0]).exp()
    assert torch.allclose(noise.square().mean((0, 2)), expected, rtol=0.15)


def test_weights_are_shares_that_follow_their_concentrations() -> None:
    torch.manual_seed(0)
    sampler = sampler_of(ours(Chain(None, nn.Linear(7, 5)), monteclora(num_samples=3)))
    with torch.no_grad():
        sampler.expert_weights_prior.copy_(torch.tensor([2.0, 3.0, 4.0]))
        w = torch.stack([sampler._weights() for _ in range(4000)])
    assert torch.allclose(w.sum(1), torch.ones(4000), atol=1e-5)
    alpha = torch.tensor([2.0, 3.0, 4.0]).exp()
    assert torch.allclose(w.mean(0), alpha / alpha.sum(), atol=0.01)


def test_divergence_is_nothing_at_the_priors_and_averaged_over_layers() -> None:
    tuner = ours(base_of("linear")(), monteclora(["first", "layer"], kl_loss_weight=1.0, dirichlet_prior=0.5))
    samplers = [a.lora_monteclora_sampler for _, a in tuner.adapters("default")]
    with torch.no_grad():
        for sampler in samplers:
            sampler.std_prior.zero_()
            sampler.expert_weights_prior.fill_(0.5).log_()
    assert abs(tuner.penalty().item()) < 1e-5
    with torch.no_grad():
        samplers[0].std_prior.fill_(0.3)
    e = torch.tensor(0.6).exp()
    expected = (3 + 1) * 0.5 * 3 * (e - 1 - 0.6) / 2  # Wishart and Gaussian, three rows, mean of two layers
    assert torch.allclose(tuner.penalty(), expected, rtol=1e-4)


def test_training_reaches_the_distribution() -> None:
    tuner = ours(Chain(None, nn.Linear(7, 5)), monteclora(sample_scaler=0.1)).train()
    tuner(torch.randn(4, 7)).square().sum().backward()
    sampler = sampler_of(tuner)
    assert sampler.std_prior.grad.abs().sum() > 0 and sampler.expert_weights_prior.grad.abs().sum() > 0


@needs_peer
@pytest.mark.parametrize("kind", ["linear", "conv1d_hf"])
def test_parity(kind: str, tmp_path) -> None:
    import peft

    settings = {"r": 4, "target_modules": ["layer"]}
    both_ways(
        base_of(kind), peft.LoraConfig(**settings, monteclora_config=peft.MontecloraConfig()),
        LoraConfig(**settings, monteclora_config=MontecloraConfig()), inputs_of(kind), tmp_path,
    )  # fmt: skip
