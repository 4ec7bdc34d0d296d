"""Times LoRA on fused expert parameters over the base: a training step, a decoded token, bytes kept for backward.

python benchmarks/experts.py --experts 32 --libraries veneer,peft
python benchmarks/experts.py --experts 128
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, interleave, kept, libraries, report

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def model(experts: int, layers: int, hidden: int, width: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, moe_intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=hidden // 4, vocab_size=1024, num_experts=experts,
        num_experts_per_tok=4,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).requires_grad_(False)


def stepping(model: Any, embeds: torch.Tensor, ids: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(inputs_embeds=embeds.clone().requires_grad_(), labels=ids, use_cache=False).loss.backward()

    return step


@torch.no_grad()
def decoding(model: Any, ids: torch.Tensor, tokens: int = 8) -> Callable[[], None]:
    @torch.no_grad()
    def decode() -> None:
        model.eval()
        for _ in range(tokens):
            model(input_ids=ids, use_cache=False)
        model.train()

    return decode


def main() -> None:
    given = arguments(__doc__ or "", experts=32, layers=4, hidden=256, width=192, rank=8, batch=2, length=128)
    base = model(given.experts, given.layers, given.hidden, given.width)
    ids = torch.randint(0, 1024, (given.batch, given.length))
    embeds = base.get_input_embeddings()(ids).detach()
    models = {"base": base}
    for name, library in libraries(given.libraries).items():
        config = library.LoraConfig(
            r=given.rank, lora_alpha=16, target_modules=[], target_parameters=TARGETS, task_type="CAUSAL_LM"
        )
        models[name] = library.get_peft_model(copy.deepcopy(base), config).train()
    steps = {name: stepping(one, embeds, ids) for name, one in models.items()}
    tokens = {name: decoding(one, ids[:1, :1]) for name, one in models.items()}
    shape = f"{given.experts} rank {given.rank}"
    report(f"experts {shape}: training step", interleave(steps, given.rounds), "base")
    report(f"experts decode {shape}: 8 tokens", interleave(tokens, given.rounds), "base")
    for name, one in models.items():
        print(f"{'kept for backward, MiB':34}{name:>12}{kept(one, steps[name]):12.1f}")


if __name__ == "__main__":
    main()
