"""Times a training step (forward and backward) of LoRA and its options over the frozen base's forward and backward.

For veneer also with the loss that takes its logits in chunks, as ``veneer train`` does; elsewhere the model's own loss.

python benchmarks/train_step.py --libraries veneer,peft --rank 8
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, interleave, kept, libraries, llama, report


def own_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def chunked_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from veneer.hf.heads import label_log_probs

    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    log_p = label_log_probs(model, labels[:, 1:], labels.shape[1], **inputs)
    assert log_p is not None
    return -log_p.mean()


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

    def stepping(model: Any, loss: Callable[..., torch.Tensor] = own_loss) -> Callable[[], None]:
        return lambda: loss(model, batch()).backward()

    def batch() -> dict[str, Any]:
        return {"inputs_embeds": embeds.clone().requires_grad_(), "labels": ids, "use_cache": False}

    candidates: dict[str, Any] = {"base": stepping(base)}
    saved = {"base": base}
    for option, more in options.items():
        for name, library in names.items():
            config = library.LoraConfig(
                r=given.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **more
            )
            model = library.get_peft_model(copy.deepcopy(base), config).train()
            losses = {"": own_loss} | ({", chunked loss": chunked_loss} if name == "veneer" else {})
            for suffix, loss in losses.items():
                candidates[f"{name} {option}{suffix}"] = stepping(model, loss)
                saved[f"{name} {option}{suffix}"] = model
    print(f"{'kept for backward, MiB':34}")
    for name, model in saved.items():
        print(f"{name:34}{kept(model, candidates[name]):12.0f}", flush=True)
    if given.rounds:
        title = f"train step rank {given.rank} {given.dtype}: over the frozen base"
        report(title, interleave(candidates, given.rounds), "base")


if __name__ == "__main__":
    main()
