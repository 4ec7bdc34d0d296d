"""Times four adapters that train on the quarters of one batch, in one pass and one after the other, over one base pass.

python benchmarks/train_rows.py --libraries veneer,peft
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import arguments, interleave, libraries, llama, report

NAMES = ["default", "b", "c", "d"]


def main() -> None:
    given = arguments(
        __doc__ or "", rank=8, hidden=512, layers=8, mlp=1408, vocab=8192, batch=4, length=256
    )  # fmt: skip
    base = llama(given.hidden, given.layers, given.mlp, given.vocab).requires_grad_(False)
    ids = torch.randint(0, given.vocab, (given.batch, given.length))
    embeds = base.get_input_embeddings()(ids).detach()

    def step(model: Any, rows: slice = slice(None), **more: Any) -> None:
        x = embeds[rows].clone().requires_grad_()
        model(inputs_embeds=x, labels=ids[rows], use_cache=False, **more).loss.backward()

    def in_turn(model: Any) -> None:
        for number, name in enumerate(NAMES):
            model.set_adapter(name)
            step(model, slice(number * given.batch // 4, (number + 1) * given.batch // 4))

    candidates = {"base": lambda: step(base)}
    for name, library in libraries(given.libraries).items():
        model = library.get_peft_model(
            copy.deepcopy(base),
            library.LoraConfig(r=given.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        for other in NAMES[1:]:
            model.add_adapter(other, copy.deepcopy(model.peft_config["default"]))
        model.train()
        candidates[f"{name} one after the other"] = lambda model=model: in_turn(model)
        if name == "veneer":  # the peer routes rows in inference only
            together = copy.deepcopy(model)
            together.base_model.set_adapter(NAMES)
            rows = [n for n in NAMES for _ in range(given.batch // 4)]
            candidates["veneer in one pass"] = lambda: step(together, adapter_names=rows)
    report(f"train rows rank {given.rank}: four adapters", interleave(candidates, given.rounds), "base")


if __name__ == "__main__":
    main()
