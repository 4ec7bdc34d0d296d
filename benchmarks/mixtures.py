"""Training step of one adapted linear layer: routed experts beside LoRAs of their active and of their whole rank.

    python benchmarks/mixtures.py [--device cuda] [--width 1024] [--tokens 2048]

Every method is timed forward and backward in turns, and the median of the rounds is shown over the plain LoRA's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

from veneer import LoraConfig, LoraMoeConfig, MolaConfig, MoleConfig
from veneer.engine.tuner import Tuner

R, EXPERTS, K = 8, 6, 2
ON: dict[str, Any] = {"target_modules": ["0"]}
METHODS = {
    f"LoRA, r {R * K} (active rank)": LoraConfig(r=R * K, **ON),
    f"LoRA, r {R * EXPERTS} (whole rank)": LoraConfig(r=R * EXPERTS, **ON),
    f"MoLA, top {K} of {EXPERTS}, r {R}": MolaConfig(r=R, experts=EXPERTS, top_k=K, **ON),
    f"LoRAMoE, {EXPERTS} dense, r {R}": LoraMoeConfig(r=R, experts=EXPERTS, **ON),
    f"MoLE, {EXPERTS} trained LoRAs, r {R}": MoleConfig(r=R, experts=[f"e{i}" for i in range(EXPERTS)], **ON),
}


def step(tuner: Tuner, x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    tuner(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    x = torch.randn(4, given.tokens // 4, given.width, device=given.device, requires_grad=True)
    tuners = {}
    for name, config in METHODS.items():
        tuners[name] = Tuner(nn.Sequential(nn.Linear(given.width, given.width)).to(given.device))
        tuners[name].add("a", config)
        tuners[name].set_active("a")
    times: dict[str, list[float]] = {name: [] for name in tuners}
    for _ in range(given.rounds):
        for name, tuner in tuners.items():
            times[name].append(step(tuner, x))
    reference = statistics.median(next(iter(times.values()))[3:])
    for name, found in times.items():
        median = statistics.median(found[3:])
        print(f"| {name} | {1e3 * median:.2f} ms | {median / reference:.2f} |")


if __name__ == "__main__":
    main()
