"""Times LoRA's starts on one 2048 x 2048 layer: PiSSA, its randomised form, OLoRA, LoftQ.

python benchmarks/starts.py --libraries veneer,peft
"""

from __future__ import annotations

from common import One, arguments, interleave, libraries, report


def main() -> None:
    given = arguments(__doc__ or "", width=2048, rank=16)
    for start in (True, "pissa", "pissa_niter_16", "olora", "orthogonal"):
        candidates = {}
        for name, library in libraries(given.libraries).items():
            base = One(given.width)
            weight = base.layer.weight.detach().clone()

            def run(library=library, base=base, weight=weight) -> None:
                config = library.LoraConfig(
                    r=given.rank, lora_alpha=given.rank, target_modules=["layer"], init_lora_weights=start
                )
                library.get_peft_model(base, config).unload()
                base.layer.weight.data.copy_(weight)

            candidates[name] = run
        report(f"start {start}", interleave(candidates, max(1, given.rounds // 2)), given.libraries.split(",")[-1])


if __name__ == "__main__":
    main()
