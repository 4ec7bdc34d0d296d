"""Memory of a training step: measured in processes of their own, calculated, and calculated for large models.

python benchmarks/memory.py                      # a Llama of 30 M parameters, batch 4 x 256
python benchmarks/memory.py --hidden 768 --layers 12
python benchmarks/memory.py --table true         # what 7B, 13B and 65B need; nothing of it is allocated

What is measured is the resident memory of the process, so its allocator's rounding is in it; what is calculated is what
torch asks for (``veneer.train.memory``).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, arguments

MODES = [(how, checkpointing) for how in ("full", "lora", "qlora") for checkpointing in (False, True)]
SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40), "65B": (8192, 22016, 80, 64)}
"""Llama: hidden, mlp, layers, heads."""
MIB, GB = 2**20, 1e9


def config(hidden: int, mlp: int, layers: int, heads: int, vocab: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocab, tie_word_embeddings=False,
    )  # fmt: skip


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measure(how: str, checkpointing: bool, shape: tuple[int, ...], rows: int, length: int) -> dict[str, float]:
    """Two steps on this machine; the second one counts."""
    from transformers import LlamaForCausalLM

    from veneer import LoraConfig, get_peft_model, quantize_model

    ids = torch.randint(0, 100, (rows, length))
    before = resident()
    model: Any = LlamaForCausalLM(config(*shape))
    if how == "qlora":
        quantize_model(model)
    if how != "full":
        settings = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if checkpointing:
            model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how != "full":
        model = get_peft_model(model, settings)
    model.train()
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    loaded = resident()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    kept = 0
    for number in range(2):
        if number:
            base = resident()
            Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits.float(), ids.flatten())
        del logits
        kept = resident() - base if number else 0
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    return {
        "weights": sum(tensors.values()), "resident_weights": loaded - before, "moments": state, "activations": kept,
        "peak": highest() - before,
    }  # fmt: skip


def calculate(how: str, checkpointing: bool, shape: tuple[int, ...], rows: int, length: int) -> dict[str, float]:
    from veneer.train.memory import made_of, step_memory

    model = made_of(config(*shape), how=how, rank=16, dtype=torch.float32, checkpointing=checkpointing)
    found = step_memory(model, rows, length)
    return {name: getattr(found, name) for name in ("weights", "moments", "activations", "peak")}


def compare(given: Any) -> dict[str, dict[str, float]]:
    shape = (given.hidden, given.mlp, given.layers, given.heads, given.vocab)
    print(f"\nmemory of a step: hidden {shape[0]}, {shape[2]} layers, {given.rows} x {given.length} tokens, MiB")
    print(
        f"{'':26}{'weights':>10}{'moments':>10}{'kept':>10}{'peak':>10}{'calculated: kept':>20}{'peak':>10}{'off':>8}"
    )
    rows: dict[str, dict[str, float]] = {}
    for how, checkpointing in MODES:
        name = how + (", checkpointing" if checkpointing else "")
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", f"{how},{int(checkpointing)}"]
        # Every tensor of 64 kB or more is mapped by itself, and unmapped when it is freed.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        said = calculate(how, checkpointing, shape, given.rows, given.length)
        off = said["peak"] / found["peak"] - 1
        rows[name] = {f"measured_{k}": v for k, v in found.items()} | {f"calculated_{k}": v for k, v in said.items()}
        row = [found["weights"], found["moments"], found["activations"], found["peak"]]
        print(
            f"{name:26}"
            + "".join(f"{v / MIB:10.1f}" for v in row)
            + f"{said['activations'] / MIB:20.1f}{said['peak'] / MIB:10.1f}{off:8.1%}",
            flush=True,
        )
    return rows


def table(length: int) -> dict[str, dict[str, float]]:
    """GB for one sequence in bfloat16; AdamW's moments in float32, as is usual for full fine-tuning."""
    from veneer.train.memory import made_of, step_memory

    print(f"\n1 x {length} tokens, bfloat16, LoRA of rank 64 at all linear layers, GB (10^9 bytes)")
    print(f"{'':26}{'weights':>10}{'gradients':>10}{'moments':>10}{'kept':>10}{'peak':>10}")
    rows: dict[str, dict[str, float]] = {}
    for size, (hidden, mlp, layers, heads) in SIZES.items():
        for how, checkpointing in MODES:
            model = made_of(config(hidden, mlp, layers, heads, 32000), how=how, checkpointing=checkpointing)
            found = step_memory(model, 1, length, moment_bytes=8)
            name = f"{size} {how}" + (", checkpointing" if checkpointing else "")
            rows[name] = {
                k: getattr(found, k) / GB for k in ("weights", "gradients", "moments", "activations", "peak")
            }  # fmt: skip
            print(f"{name:26}" + "".join(f"{v:10.1f}" for v in rows[name].values()), flush=True)
    return rows


def main() -> None:
    given = arguments(
        __doc__ or "", hidden=512, mlp=1408, layers=8, heads=8, vocab=8192, rows=4, length=256, measure="", table=""
    )
    if given.measure:
        how, checkpointing = given.measure.split(",")
        shape = (given.hidden, given.mlp, given.layers, given.heads, given.vocab)
        measure(how, checkpointing == "1", (64, 64, 1, 1, 128), 1, 8)  # loads the libraries, which are not the model's
        print(json.dumps(measure(how, checkpointing == "1", shape, given.rows, given.length)))
        return
    name, rows = ("memory_table", table(512)) if given.table else ("memory", compare(given))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
