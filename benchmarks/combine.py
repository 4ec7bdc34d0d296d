"""Times putting two LoRA adapters of one layer together into a third of the same rank, by each kind of combination.

python benchmarks/combine.py --libraries veneer,peft
"""

from __future__ import annotations

import torch
from common import One, arguments, interleave, libraries, report


def main() -> None:
    given = arguments(__doc__ or "", width=1024, rank=16, kinds="svd,ties_svd,linear,cat")
    for kind in given.kinds.split(","):
        candidates = {}
        for name, library in libraries(given.libraries).items():
            config = library.LoraConfig(r=given.rank, target_modules=["layer"], init_lora_weights=False)
            model = library.get_peft_model(One(given.width), config, "a")
            model.add_adapter("b", config)

            def run(model=model) -> None:
                more = {"density": 0.5} if kind.startswith(("ties", "dare")) else {}
                model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type=kind, **more)
                model.delete_adapter("c")

            candidates[name] = run
        torch.manual_seed(0)
        report(f"combine {kind}", interleave(candidates, given.rounds), given.libraries.split(",")[-1])


if __name__ == "__main__":
    main()
