"""Cost of routing: a training step of one adapted layer, and of one feed-forward block, beside LoRA and beside loops.

    python benchmarks/mixtures.py [--width 1024] [--hidden 2816] [--tokens 2048] [--rounds 9] [--device cuda]

Forward and backward, timed in turns; ratios are of CPU seconds (wall seconds on CUDA). "One by one" runs the same
experts as a loop over them, each a LoRA (or a whole feed-forward block) of its own, which is the dense sum of experts.
FLOPs are what is calculated beside the base, forward, for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, interleave, report
from torch import Tensor, nn

from veneer import LoraConfig, LoraMoeConfig, MixLoraConfig, MolaConfig, MoleConfig
from veneer.engine.tuner import Tuner
from veneer.ops.gating import gated_lowrank_naive, top_k_softmax

R, EXPERTS, K = 8, 6, 2


class FeedForward(nn.Module):
    """A gated block, as Llama has it."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj, self.act_fn = nn.Linear(hidden, width, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OneByOne(nn.Module):
    """MoLA's layer with a loop over its experts."""

    def __init__(self, width: int):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(EXPERTS, R, width) / width**0.5)
        self.b = nn.Parameter(torch.zeros(EXPERTS, width, R))
        self.router = nn.Parameter(torch.randn(EXPERTS, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gates, _ = top_k_softmax(x @ self.router.T, K)
        return self.base(x) + gated_lowrank_naive(x, self.a, self.b, gates)


class BlocksOneByOne(nn.Module):
    """MixLoRA's block with a loop over its experts, each of which runs the whole block with its own LoRAs."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        block = FeedForward(width, hidden)
        configs = [LoraConfig(r=R, target_modules=[f"{p}_proj" for p in ("gate", "up", "down")])] * EXPERTS
        self.experts = nn.ModuleList()
        for config in configs:
            tuner = Tuner(_sharing(block, width, hidden))
            tuner.add("a", config)
            tuner.set_active("a")
            self.experts.append(tuner)
        self.router = nn.Parameter(torch.randn(EXPERTS, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        gates, _ = top_k_softmax(x @ self.router.T, K)
        return sum(gates[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[return-value]


def _sharing(block: FeedForward, width: int, hidden: int) -> FeedForward:
    twin = FeedForward(width, hidden)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(twin, name).weight = getattr(block, name).weight
    return twin


def tuned(model: nn.Module, config: Any) -> Tuner:
    tuner = Tuner(model)
    tuner.add("a", config)
    tuner.set_active("a")
    return tuner.train()


def layers(width: int) -> dict[str, tuple[nn.Module, float]]:
    """Name -> (one adapted layer, FLOPs for a token beside the base)."""
    one = {"target_modules": ["0"]}

    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(width, width))

    lora, routed = 4 * R * width, 4 * EXPERTS * R * width + 2 * EXPERTS * width
    return {
        f"LoRA, r {R * K} (active rank)": (tuned(plain(), LoraConfig(r=R * K, **one)), K * lora),
        f"LoRA, r {R * EXPERTS} (whole rank)": (tuned(plain(), LoraConfig(r=R * EXPERTS, **one)), EXPERTS * lora),
        f"MoLA, top {K} of {EXPERTS}, r {R}": (
            tuned(plain(), MolaConfig(r=R, experts=EXPERTS, top_k=K, **one)),
            routed,
        ),
        "  one by one": (OneByOne(width), routed),
        f"LoRAMoE, {EXPERTS} dense, r {R}": (tuned(plain(), LoraMoeConfig(r=R, experts=EXPERTS, **one)), routed),
        f"MoLE, {EXPERTS} trained LoRAs, r {R}": (
            tuned(plain(), MoleConfig(r=R, experts=[f"e{i}" for i in range(EXPERTS)], **one)),
            EXPERTS * lora + 2 * EXPERTS * R * (R + EXPERTS),
        ),
    }


def blocks(width: int, hidden: int) -> dict[str, tuple[nn.Module, float]]:
    """The same for a feed-forward block."""
    three = [f"{p}_proj" for p in ("gate", "up", "down")]
    mixed = MixLoraConfig(r=R, experts=EXPERTS, top_k=K, lora_dropout=0.0, target_modules=["0"])
    lora = 6 * R * (width + hidden)
    base = 6 * width * hidden
    return {
        f"LoRA on the three layers, r {R * K}": (
            tuned(nn.Sequential(FeedForward(width, hidden)), LoraConfig(r=R * K, target_modules=three)),
            K * lora,
        ),
        f"MixLoRA, top {K} of {EXPERTS}, r {R}": (
            tuned(nn.Sequential(FeedForward(width, hidden)), mixed),
            EXPERTS * R * ((4 + 2 * K) * width + 6 * K * hidden) + 2 * EXPERTS * width,
        ),
        "  one by one": (BlocksOneByOne(width, hidden), (EXPERTS - 1) * base + EXPERTS * lora + 2 * EXPERTS * width),
    }


def main() -> None:
    given = arguments(__doc__ or "", width=1024, hidden=2816, tokens=2048, device="cpu")
    x = torch.randn(4, given.tokens // 4, given.width, device=given.device, requires_grad=True)

    def step(module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            module(x).sum().backward()
            if x.is_cuda:
                torch.cuda.synchronize()

        return run

    for title, found in (("mixtures", layers(given.width)), ("mixtures_blocks", blocks(given.width, given.hidden))):
        modules = {name: module.to(given.device) for name, (module, _) in found.items()}
        rows = interleave({name: step(module) for name, module in modules.items()}, given.rounds)
        report(f"{title}: a step of {given.tokens} tokens, width {given.width}", rows, next(iter(rows)))
        for name, (_, flops) in found.items():
            print(f"{name:34}{flops / 1e3:12,.0f} kFLOP a token beside the base")


if __name__ == "__main__":
    main()
