"""Times one-token decoding with adapters on, off, several, and mixed in a batch, over the bare base model.

python benchmarks/decode.py --libraries veneer,peft --hidden 64 --layers 32
"""

from __future__ import annotations

import copy

import torch
from common import arguments, interleave, libraries, llama, report


def main() -> None:
    given = arguments(__doc__ or "", hidden=64, layers=32, batch=8, steps=5)
    names = libraries(given.libraries)
    base = llama(hidden=given.hidden, layers=given.layers, mlp=2 * given.hidden, vocab=256, heads=4).eval()
    layers = 7 * given.layers
    one, rows = torch.randint(0, 256, (1, 1)), torch.randint(0, 256, (given.batch, 1))
    models = {}
    for name, library in names.items():
        config = library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        models[name] = library.get_peft_model(copy.deepcopy(base), config).eval()
        for extra in ("b", "c", "d"):
            models[name].add_adapter(extra, copy.deepcopy(config))

    def run(model, ids, **more):
        with torch.no_grad():
            for _ in range(given.steps):
                model(input_ids=ids, use_cache=False, **more)

    def compare(title: str, ids, **more) -> None:
        candidates = {"base": lambda: run(base, ids)}
        candidates |= {n: (lambda m=m: run(m, ids, **more)) for n, m in models.items()}
        timed = interleave(candidates, given.rounds)
        report(title, timed, "base")
        for name in models:
            added = (timed[name]["cpu_s"] - timed["base"]["cpu_s"]) / given.steps / layers
            print(f"{name:34}{1e6 * added:12.1f} us a wrapped layer")

    compare("decode one adapter", one)
    for model in models.values():
        model.base_model.set_adapter(["default", "b", "c", "d"])
    compare("decode four active", one)
    for model in models.values():
        model.set_adapter("default")
        model.base_model.disable_adapter_layers()
    compare("decode disabled", one)
    for model in models.values():
        model.base_model.enable_adapter_layers()
    compare("decode mixed batch", rows, adapter_names=["default", "b", "c", "d"] * (given.batch // 4))
    for name, library in names.items():
        config = library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
        models[name] = library.get_peft_model(copy.deepcopy(base), config).eval()
    compare("decode dora", one)


if __name__ == "__main__":
    main()
