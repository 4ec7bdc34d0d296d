"""On a GPU: tokens a second and peak memory of training (LoRA, dropout, DoRA, QLoRA), and of decoding mixed batches.

A Llama of the 1B class with random weights in bfloat16; QLoRA over veneer's own NF4, for peft over bitsandbytes'. Every
candidate is built, warmed up, timed (median wall seconds) and let go before the next one, in one process.

python benchmarks/gpu.py
python benchmarks/gpu.py --device cpu --hidden 64 --layers 2 --mlp 128 --vocab 256 --heads 4 --batch 1 --length 32 \
    --adapters 1,2 --rows 2 --new 4 --rounds 1                              # only to see that it runs
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, arguments, libraries, llama
from torch import nn
from train_step import chunked_loss, own_loss

from veneer.core.nf4_linear import quantize_model
from veneer.ops import kernels

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, dropout 0.1": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "QLoRA": {},
}
Row = dict[str, float | str]


def commit() -> str:
    """Of this checkout; with a + where files differ from it."""
    here = Path(__file__).parent
    told = [["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "-uno"]]
    done = [subprocess.run(t, cwd=here, capture_output=True, text=True).stdout.strip() for t in told]
    return (done[0] or "unknown") + ("+" if done[1] else "")


class Machine:
    """The device: how to wait for it, and what it used."""

    def __init__(self, name: str):
        self.device = torch.device(name)
        self.is_gpu = self.device.type == "cuda"
        self.name = (
            torch.cuda.get_device_name(self.device) if self.is_gpu else f"{name} ({torch.get_num_threads()} threads)"
        )

    def cleared(self) -> None:
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def measured(self, build: Callable[[], Callable[[], Any]], tokens: int, rounds: int) -> Row:
        """tokens/s and peak GiB of what ``build`` returns; or why it does not run."""
        self.cleared()
        try:
            run = build()
            for _ in range(3 if self.is_gpu else 1):
                self.seconds(run)
            if self.is_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            median = statistics.median(self.seconds(run) for _ in range(rounds))
        except Exception as error:  # a library that is missing, or a device that is too small: the others go on
            return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
        row: Row = {"tokens_per_s": tokens / median, "seconds": median}
        if self.is_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row


@contextlib.contextmanager
def without_kernels(off: bool) -> Iterator[None]:
    if off:
        kernels.switch("all", False)
    try:
        yield
    finally:
        if off:
            kernels.switch("all")


def base(given: Any, device: torch.device) -> nn.Module:
    return llama(
        given.hidden, given.layers, given.mlp, given.vocab, given.heads, max_position_embeddings=max(2048, given.length)
    ).to(device, torch.bfloat16)


def in_bitsandbytes(model: nn.Module) -> nn.Module:
    """The linear layers but the head in bitsandbytes' NF4, with double quantisation."""
    import bitsandbytes as bnb

    device = next(model.parameters()).device
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            model.set_submodule(path, packed.to(device))
    model.is_loaded_in_4bit = model.is_quantized = True  # type: ignore[assignment]
    return model


def training(given: Any, machine: Machine, library: Any, method: str, candidate: str) -> Callable[[], Any]:
    """One step: forward, backward, AdamW."""
    model: Any = base(given, machine.device)
    if method == "QLoRA":
        model = quantize_model(model) if candidate.startswith("veneer") else in_bitsandbytes(model)
    config = library.LoraConfig(
        r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear", task_type="CAUSAL_LM", **METHODS[method]
    )
    model = library.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, given.vocab, (given.batch, given.length), device=machine.device)
    if "compile" in candidate:
        model = torch.compile(model)
    loss_of = chunked_loss if "chunked" in candidate else own_loss

    def step() -> None:
        loss_of(model, {"input_ids": ids, "labels": ids, "use_cache": False}).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(given: Any, machine: Machine, library: Any, count: int) -> Callable[[], Any]:
    """``rows`` sequences, each of its own of ``count`` adapters, by greedy search."""
    model: Any = base(given, machine.device).eval()
    more: dict[str, Any] = {}
    if library is not None:
        config = library.LoraConfig(
            r=given.rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        model = library.get_peft_model(model, config, adapter_name="a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", config)
        model.eval()
        if count > 1:
            more = {"adapter_names": [f"a{i % count}" for i in range(given.rows)]}
    ids = torch.randint(3, given.vocab, (given.rows, 16), device=machine.device)
    more |= {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def run() -> None:
        with torch.no_grad():
            model.generate(input_ids=ids, max_new_tokens=given.new, min_new_tokens=given.new, **more)

    return run


def show(title: str, rows: dict[str, Row]) -> None:
    print(f"\n{title:38}{'tokens/s':>12}{'ms':>12}{'peak GiB':>10}", flush=True)
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name:38}  {row['failed']}")
            continue
        peak = f"{row['peak_gib']:10.2f}" if "peak_gib" in row else f"{'-':>10}"
        print(f"{name:38}{row['tokens_per_s']:12.0f}{1e3 * float(row['seconds']):12.2f}{peak}", flush=True)


def main() -> None:
    given = arguments(
        __doc__ or "", device="cuda", hidden=2048, layers=16, mlp=8192, vocab=128256, heads=32, batch=4, length=1024,
        rank=16, adapters="1,16,64", rows=64, new=64, compile=1,
    )  # fmt: skip
    machine, names = Machine(given.device), libraries(given.libraries)
    told: dict[str, Any] = {
        "commit": commit(), "device": machine.name, "torch": torch.__version__, "given": vars(given),
    }  # fmt: skip
    print(f"veneer {told['commit']} on {machine.name}, torch {torch.__version__}")
    candidates: dict[str, Any] = {**names}
    if "veneer" in names:
        candidates |= {f"veneer, {more}": names["veneer"] for more in ("kernels off", "chunked loss")}
    if "peft" in names and given.compile:
        candidates["peft, torch.compile"] = names["peft"]
    for method in METHODS:
        rows = {}
        for candidate, library in candidates.items():
            with without_kernels("off" in candidate):
                rows[candidate] = machine.measured(
                    lambda: training(given, machine, library, method, candidate),
                    given.batch * given.length,
                    given.rounds,
                )
            torch.compiler.reset()
        told[f"training {method}"] = rows
        show(f"training, {method}", rows)
    for count in map(int, given.adapters.split(",")):
        rows = {}
        for candidate, library in {"base": None, **candidates}.items():
            if "chunked" in candidate or "compile" in candidate:
                continue
            with without_kernels("off" in candidate):
                rows[candidate] = machine.measured(
                    lambda: decoding(given, machine, library, count), given.rows * given.new, given.rounds
                )
        told[f"decoding {count} adapters"] = rows
        show(f"decoding, {count} adapter{'s' if count > 1 else ''} in {given.rows} rows", rows)
    told["kernels"] = kernels.report()
    print("\nkernels:", told["kernels"] or "none were asked for")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"gpu_{machine.device.type}.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
