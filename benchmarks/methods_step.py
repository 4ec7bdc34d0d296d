"""Times a training step and a one-token decode of every method, over the base model, beside the peer's where it has it.

Counts what a step keeps for its backward pass, too.

python benchmarks/methods_step.py --libraries veneer,peft --rounds 5 --only HRA,LOKR
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from common import arguments, interleave, kept, libraries, llama, report

OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 8}, "IA3": {"feedforward_modules": ["down_proj"]}, "OFT": {"oft_block_size": 32},
    "BOFT": {"boft_block_size": 4}, "HRA": {"r": 8}, "ROAD": {}, "LOHA": {"r": 8}, "LOKR": {"r": 8}, "VERA": {"r": 64},
    "RANDLORA": {"r": 32}, "FOURIERFT": {"n_frequency": 500}, "C3A": {"block_size": 64}, "MISS": {"r": 64},
    "HIRA": {"r": 8}, "SHIRA": {"r": 8}, "DELORA": {"r": 8}, "GRALORA": {"r": 8},
    "WAVEFT": {"n_frequency": 500},
    "VBLORA": {"vector_length": 64, "num_vectors": 64}, "ADALORA": {"init_r": 12, "total_step": 1000},
    "PVERA": {"r": 64}, "TINYLORA": {}, "UNILORA": {"r": 8}, "PSOFT": {"r": 32}, "PEANUT": {"r": 8}, "LILY": {"r": 8},
    "GLORA": {"r": 8}, "DEFT": {"r": 8}, "ADAMSS": {}, "FROD": {}, "OSF": {}, "SUPERTUNING": {}, "BEFT": {},
    "POLY": {"r": 8}, "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(100))},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 10}, "PROMPT_TUNING": {"num_virtual_tokens": 16},
    "P_TUNING": {"num_virtual_tokens": 16, "encoder_hidden_size": 128}, "PREFIX_TUNING": {"num_virtual_tokens": 16},
}  # fmt: skip
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL_WIDE = ("ADAPTION_PROMPT", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def config(library: Any, peft_type: str) -> Any:
    """This method's settings in a library's own class, on all linear layers where it sits at layers.

    Raises:
        KeyError: the library does not have the method.
    """
    if library.__name__ == "veneer":
        import veneer.methods  # noqa: F401 - enters the methods into the registry
        from veneer.core.registry import METHODS

        build = METHODS[peft_type].config
    else:
        build = library.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    where = {} if peft_type in MODEL_WIDE else {"target_modules": NAMES}
    return build(task_type="CAUSAL_LM", **where | OPTIONS[peft_type])


def main() -> None:
    warnings.simplefilter("ignore")
    given = arguments(
        __doc__ or "", hidden=512, layers=2, mlp=1408, vocab=1024, batch=4, length=256, only="", dtype="float32"
    )
    names = libraries(given.libraries)
    dtype = getattr(torch, given.dtype)
    base = llama(given.hidden, given.layers, given.mlp, given.vocab).to(dtype).requires_grad_(False)
    ids = torch.randint(0, given.vocab, (given.batch, given.length))
    embeds = base.get_input_embeddings()(ids).detach()

    def step(model: Any, **more: Any) -> None:
        model(inputs_embeds=embeds.clone().requires_grad_(), labels=ids, use_cache=False, **more).loss.backward()

    def decode(model: Any, **more: Any) -> None:
        with torch.no_grad():
            for _ in range(5):
                model(input_ids=ids[:1, :1], use_cache=False, **more)

    def candidate(name: str, model: Any, run: Any, peft_type: str) -> Any:
        tasks = peft_type == "POLY" and name != "base"
        more = {"task_ids": torch.zeros(given.batch if run is step else 1, dtype=torch.long)} if tasks else {}
        return lambda: run(model, **more)

    for peft_type in given.only.split(",") if given.only else OPTIONS:
        models = {"base": base}
        for name, library in names.items():
            try:
                models[name] = library.get_peft_model(copy.deepcopy(base), config(library, peft_type))
            except (KeyError, ValueError, NotImplementedError) as error:
                print(f"{peft_type}: {name} has no such row here ({type(error).__name__}: {str(error)[:80]})")
        for what, run in (("step", step), ("decode", decode)):
            for model in models.values():
                model.train(what == "step")
            rows = interleave({n: candidate(n, m, run, peft_type) for n, m in models.items()}, given.rounds)
            report(f"{what} {peft_type}", rows, "base")
            if what == "step":
                more = [f"{n} {kept(m, candidate(n, m, run, peft_type)):.1f}" for n, m in models.items()]
                print(f"kept for backward, MiB: {', '.join(more)}", flush=True)


if __name__ == "__main__":
    main()
