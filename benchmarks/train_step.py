"""Times a training step (forward and backward) of LoRA and its options over the frozen base's forward and backward.

python benchmarks/train_step.py --libraries veneer,peft --rank 8
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import arguments, interleave, libraries, llama, report


def saved_bytes(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """MiB of unique storages kept for backward, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch).loss.backward()
    return sum(kept.values()) / 2**20


def main() -> None:
    given = arguments(
        __doc__ or "", rank=8, hidden=512, layers=8, mlp=1408, vocab=8192, batch=4, length=256, dtype="float32"
    )
    names = libraries(given.libraries)
    dtype = getattr(torch, given.dtype)
    base = llama(given.hidden, given.layers, given.mlp, given.vocab).to(dtype).requires_grad_(False)
    ids = torch.randint(0, given.vocab, (given.batch, given.length))
    options = {"lora": {}, "dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}
    embeds = base.get_input_embeddings()(ids).detach()

    def step_base() -> None:
        base(inputs_embeds=embeds.clone().requires_grad_(), labels=ids, use_cache=False).loss.backward()

    candidates: dict[str, Any] = {"base": step_base}
    models = {}
    for option, more in options.items():
        for name, library in names.items():
            config = library.LoraConfig(
                r=given.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **more
            )
            try:
                model = library.get_peft_model(copy.deepcopy(base), config).train()
            except NotImplementedError as error:
                print(error)
                continue
            models[f"{name} {option}"] = model

            def step(model=model) -> None:
                model(inputs_embeds=embeds.clone().requires_grad_(), labels=ids, use_cache=False).loss.backward()

            candidates[f"{name} {option}"] = step
    report(
        f"train step rank {given.rank} {given.dtype}: over the frozen base",
        interleave(candidates, given.rounds),
        "base",
    )
    batch = {"inputs_embeds": embeds.clone().requires_grad_(), "labels": ids, "use_cache": False}
    print(f"{'saved for backward, MiB':34}{'base':>12}{saved_bytes(base, batch):12.0f}")
    for name, model in models.items():
        print(f"{'':34}{name:>12}{saved_bytes(model, batch):12.0f}")


if __name__ == "__main__":
    main()
