"""Times what users do with adapters on a model of 225 small linear layers: add, load, switch, disable, delete, merge.

python benchmarks/adapters_many_layers.py --libraries veneer,peft --adapters 10
"""

from __future__ import annotations

import copy
import tempfile

import torch
from common import arguments, interleave, libraries, llama, report


def main() -> None:
    given = arguments(__doc__ or "", adapters=10, layers=32, hidden=64)
    names = libraries(given.libraries)
    base = llama(hidden=given.hidden, layers=given.layers, mlp=2 * given.hidden, vocab=256, heads=4)

    def config(library):
        return library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")

    bases = {name: [copy.deepcopy(base) for _ in range(given.rounds + 1)] for name in names}
    rows = interleave(
        {n: (lambda n=n, lib=lib: lib.get_peft_model(bases[n].pop(), config(lib))) for n, lib in names.items()},
        given.rounds,
    )
    report("get_peft_model", rows, given.libraries.split(",")[-1])

    models = {n: lib.get_peft_model(copy.deepcopy(base), config(lib)) for n, lib in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        next(iter(models.values())).save_pretrained(folder)
        count = dict.fromkeys(names, 0)

        def load(name: str) -> None:
            count[name] += 1
            models[name].load_adapter(folder, f"x{count[name]}")

        for number in range(1, given.adapters):
            if number in (1, given.adapters - 1):
                rows = interleave({n: (lambda n=n: load(n)) for n in names}, 1, 0)
                report(f"load_adapter number {number + 1}", rows, given.libraries.split(",")[-1])
            else:
                for name in names:
                    load(name)
    which = dict.fromkeys(names, 0)

    def switch(name: str) -> None:
        which[name] = 1 - which[name]
        models[name].set_adapter("default" if which[name] else "x1")

    def disable(name: str) -> None:
        with models[name].disable_adapter():
            pass

    last = given.libraries.split(",")[-1]
    report("set_adapter", interleave({n: (lambda n=n: switch(n)) for n in names}, given.rounds), last)
    report("disable_adapter", interleave({n: (lambda n=n: disable(n)) for n in names}, given.rounds), last)
    report(
        "delete_adapter",
        interleave({n: (lambda n=n: models[n].delete_adapter(f"x{given.adapters - 1}")) for n in names}, 1, 0),
        last,
    )
    for name in names:
        modules = sum(1 for _ in models[name].modules())
        print(
            f"{name}: {modules / (7 * given.layers + 1):.1f} modules a linear layer with {given.adapters - 1} adapters"
        )
    report("merge_and_unload", interleave({n: (lambda n=n: models[n].merge_and_unload()) for n in names}, 1, 0), last)
    merging(names, given.rounds)


def merging(names: dict, rounds: int) -> None:
    """Time ``merge_and_unload`` of a few wide layers over the bare products and sums, whose memory is new as well."""
    base = llama(hidden=1024, layers=2, mlp=2816, vocab=256, heads=8)
    kinds = {
        n: lib.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        for n, lib in names.items()
    }
    ready = {
        n: [lib.get_peft_model(copy.deepcopy(base), copy.deepcopy(kinds[n])) for _ in range(rounds + 1)]
        for n, lib in names.items()
    }
    weights = [m.weight.detach() for n, m in base.named_modules() if n.endswith("_proj")]
    factors = [(torch.randn(w.shape[0], 8), torch.randn(8, w.shape[1])) for w in weights]
    candidates = {"addmm": lambda: [torch.addmm(w, b, a) for w, (b, a) in zip(weights, factors, strict=True)]}
    candidates |= {n: (lambda n=n: ready[n].pop().merge_and_unload(safe_merge=True)) for n in names}
    report("merge_and_unload wide layers", interleave(candidates, rounds), "addmm")


if __name__ == "__main__":
    main()
