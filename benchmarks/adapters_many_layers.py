"""Times what users do with adapters on models of many small linear layers: add, load, switch, disable, delete, merge.

python benchmarks/adapters_many_layers.py --libraries veneer,peft --adapters 50

The first model has 225 linear layers, the second, a mixture of experts, 1,600. What grows with the adapters that are
there already is timed with 1, with 9 and with one less than ``--adapters`` beside it.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from common import arguments, interleave, libraries, llama, report
from torch import Tensor, nn

SWITCHED = 10
"""How many adapters there are when switching, disabling and deleting are timed."""


class Experts(nn.Module):
    """A mixture of gated feed-forward blocks, each of them three linear layers of its own."""

    def __init__(self, hidden: int, wide: int, experts: int):
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, hidden))
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(hidden, wide, bias=False),
                    "up_proj": nn.Linear(hidden, wide, bias=False),
                    "down_proj": nn.Linear(wide, hidden, bias=False),
                }
            )
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ self.router.T, -1).unbind(-1)
        each = (e["down_proj"](nn.functional.silu(e["gate_proj"](x)) * e["up_proj"](x)) for e in self.experts)
        return sum(weight.unsqueeze(-1) * y for weight, y in zip(weights, each, strict=True))


def mixture(hidden: int) -> nn.Module:
    """16 layers of 4 projections and 32 experts each: 1,600 linear layers that "all-linear" means."""
    base = llama(hidden=hidden, layers=16, mlp=2 * hidden, vocab=256, heads=4)
    for layer in base.model.layers:
        layer.mlp = Experts(hidden, hidden // 2, 32)
    return base


def config(library):
    return library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    given = arguments(__doc__ or "", adapters=50, layers=32, hidden=64)
    names, last = libraries(given.libraries), given.libraries.split(",")[-1]
    base = llama(hidden=given.hidden, layers=given.layers, mlp=2 * given.hidden, vocab=256, heads=4)
    adding("get_peft_model", base, names, given.rounds, last)
    adding("get_peft_model 1600 layers", mixture(given.hidden), names, min(given.rounds, 3), last)
    models = {n: lib.get_peft_model(copy.deepcopy(base), config(lib)) for n, lib in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        next(iter(models.values())).save_pretrained(folder)
        for low in (False, True):
            title = "from_pretrained" + " low_cpu_mem_usage" * low
            starting(title, base, folder, names, given.rounds, last, low_cpu_mem_usage=low)
        for number in range(2, given.adapters + 1):
            load = {n: (lambda n=n, i=number: models[n].load_adapter(folder, f"x{i}")) for n in names}
            rows = interleave(load, 1, 0)
            if number in (2, 10, given.adapters):
                report(f"load_adapter number {number}", rows, last)
            if number == min(SWITCHED, given.adapters):
                switching(models, number, given.rounds, last)
    report("merge_and_unload", interleave({n: models[n].merge_and_unload for n in names}, 1, 0), last)
    merging(names, given.rounds)


def adding(title: str, base: nn.Module, names: dict, rounds: int, reference: str) -> None:
    """Time ``get_peft_model`` on copies of one base."""
    bases = {name: [copy.deepcopy(base) for _ in range(rounds + 1)] for name in names}
    candidates = {n: (lambda n=n, lib=lib: lib.get_peft_model(bases[n].pop(), config(lib))) for n, lib in names.items()}
    report(title, interleave(candidates, rounds), reference)


def starting(
    title: str, base: nn.Module, folder: str, names: dict, rounds: int, reference: str, **options: bool
) -> None:
    """Time ``from_pretrained`` on copies of one base."""
    bases = {name: [copy.deepcopy(base) for _ in range(rounds + 1)] for name in names}
    candidates = {
        n: (lambda n=n, lib=lib: lib.PeftModel.from_pretrained(bases[n].pop(), folder, **options))
        for n, lib in names.items()
    }
    report(title, interleave(candidates, rounds), reference)


def switching(models: dict, number: int, rounds: int, reference: str) -> None:
    """Time what is done to adapters that are there, and count their modules."""
    which = dict.fromkeys(models, 0)

    def switch(name: str) -> None:
        which[name] = 1 - which[name]
        models[name].set_adapter("default" if which[name] else "x2")

    def disable(name: str) -> None:
        with models[name].disable_adapter():
            pass

    def delete(name: str) -> None:
        models[name].delete_adapter("gone")

    for name in models:
        wrapped = sum(hasattr(module, "base_layer") for module in models[name].modules())
        modules = sum(1 for _ in models[name].modules())
        print(f"{name}: {modules / wrapped:.1f} modules a linear layer with {number} adapters")
    report("set_adapter", interleave({n: (lambda n=n: switch(n)) for n in models}, rounds), reference)
    report("disable_adapter", interleave({n: (lambda n=n: disable(n)) for n in models}, rounds), reference)
    for model in models.values():
        model.add_adapter("gone", copy.deepcopy(model.peft_config["x2"]))
    report("delete_adapter", interleave({n: (lambda n=n: delete(n)) for n in models}, 1, 0), reference)


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
