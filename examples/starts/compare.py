"""Seven kinds of LoRA on one model and one task: how well the first step follows full training, and the loss after.

    python compare.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out results.json
    python figure.py results.json starts.png

The task is that of ../quickstart: one word, positive or negative, for a sentence from a product review. All methods
adapt the same layers with rank 8 (AdaLoRA: 12 falling to 8), with the same batches, AdamW and learning rate. A method
that is in the results file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer import AdaLoraConfig, LoraConfig, get_peft_model, initialize
from veneer.hf.preprocess import sites_named
from veneer.methods.lora_calibrate import gathered_gradients

HERE = Path(__file__).parent
RANK, ALPHA, BATCH, CALIBRATION = 8, 16, 8, 4
LAYERS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def configs(steps: int) -> dict:
    """Name in the figure -> settings."""
    lora = {"r": RANK, "lora_alpha": ALPHA, **LAYERS}
    return {
        "LoRA": LoraConfig(**lora),
        "rsLoRA": LoraConfig(**lora, use_rslora=True),
        "DoRA": LoraConfig(**lora, use_dora=True),
        "PiSSA": LoraConfig(**lora | {"lora_alpha": RANK}, init_lora_weights="pissa"),
        "EVA": LoraConfig(**lora, init_lora_weights="eva"),
        "LoRA-GA": LoraConfig(**lora, init_lora_weights="lora_ga", use_rslora=True),
        "AdaLoRA": AdaLoraConfig(
            **LAYERS, init_r=12, target_r=RANK, lora_alpha=2 * ALPHA, total_step=steps, tinit=steps // 10,
            tfinal=steps // 2,
        ),
    }  # fmt: skip


# ---- the task -------------------------------------------------------------------------------------------------------
def read(path: Path, tokenizer) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of every row."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        (
            tokenizer(f"Review: {row['prompt']}\nSentiment:")["input_ids"],
            tokenizer(" " + row["completion"])["input_ids"],
        )
        for row in rows
    ]


def batches(rows: list, size: int, pad: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches whose labels are the completions alone."""
    out = []
    for i in range(0, len(rows) - size + 1, size):
        part = rows[i : i + size]
        width = max(len(p) + len(c) for p, c in part)
        ids = [p + c + [pad] * (width - len(p) - len(c)) for p, c in part]
        labels = [[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in part]
        mask = [[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in part]
        names = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        out.append({name: torch.tensor(value) for name, value in names.items()})
    return out


@torch.no_grad()
def evaluate(model, data: list) -> tuple[float, float]:
    """(mean loss, share of right words) on held-out batches."""
    model.eval()
    loss = right = count = 0.0
    for batch in data:
        output = model(**batch)
        labels = batch["labels"][:, 1:]
        found = output.logits[:, :-1].argmax(-1)
        loss += float(output.loss) / len(data)
        right += int(((found == labels) & (labels >= 0)).sum())
        count += int((labels >= 0).sum())
    model.train()
    return loss, right / count


# ---- how well the first step follows full training ------------------------------------------------------------------
def full_gradients(model, data: list) -> dict[str, torch.Tensor]:
    """Layer -> the gradient of its weight."""
    sites = sites_named(model, LoraConfig(**LAYERS))
    with gathered_gradients(sites) as found:
        for batch in data:
            model(**batch).loss.backward()
    return {site.path: g for site, g in found.items()}


def alignment(model, data: list, full: dict[str, torch.Tensor]) -> float:
    """Cosine between -G and the change of the weights by one small gradient step on the adapter, over all layers."""
    model.zero_grad()
    for batch in data:
        model(**batch).loss.backward()
    dot = moved = whole = 0.0
    for path, adapter in model.base_model.adapters("default"):
        before = effective(adapter)
        own = [(p, p.detach().clone()) for p in adapter.parameters() if p.grad is not None]
        size = sum(float(p.detach().square().sum()) for p, _ in own) ** 0.5
        slope = sum(float(p.grad.square().sum()) for p, _ in own) ** 0.5
        with torch.no_grad():
            for p, _ in own:
                p.sub_(1e-3 * size / max(slope, 1e-30) * p.grad)
            # one learning rate for all layers: undo the normalisation
            change = (effective(adapter) - before) * (slope / max(1e-3 * size, 1e-30))
            for p, old in own:
                p.copy_(old)
        g = full[path].double()
        dot -= float((change * g).sum())
        moved += float(change.square().sum())
        whole += float(g.square().sum())
    model.zero_grad()
    return dot / (moved * whole) ** 0.5


@torch.no_grad()
def effective(adapter) -> torch.Tensor:
    """The layer's weight with the adapter, in float64."""
    return adapter.merged(adapter.site.weight.double(), None)[0].double()


# ---- one method -----------------------------------------------------------------------------------------------------
def run(name: str, config, arguments, tokenizer, train: list, heldout: list, full: dict) -> dict:
    """Start, measure, train, measure."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32), config)
    pad = tokenizer.pad_token_id or 0
    calibration = batches(train[: BATCH * CALIBRATION], BATCH, pad)
    began = time.perf_counter()
    if getattr(config, "init_lora_weights", True) in ("eva", "lora_ga"):
        initialize(model, calibration)
    out = {"start_s": time.perf_counter() - began, "alignment": alignment(model, calibration, full)}
    out["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=arguments.lr, weight_decay=0)
    order = random.Random(0)
    out["loss"], out["heldout"] = [], [[0, *evaluate(model, heldout)]]
    step = 0
    while step < arguments.steps:
        rows = list(train)
        order.shuffle(rows)
        for batch in batches(rows, BATCH, pad)[: arguments.steps - step]:
            loss = model(**batch).loss
            penalty = model.base_model.penalty()
            (loss if penalty is None else loss + penalty).backward()
            optimiser.step()
            step += 1
            model.base_model.after_step(step)
            optimiser.zero_grad()
            out["loss"].append(float(loss.detach()))
            if step % arguments.every == 0 or step == arguments.steps:
                out["heldout"].append([step, *evaluate(model, heldout)])
    last = out["heldout"][-1]
    print(f"{name:8} alignment {out['alignment']:.3f}, held out: loss {last[1]:.3f}, right {last[2]:.1%}", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=HERE.parent / "quickstart")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, heldout = (read(arguments.data / f"{side}.jsonl", tokenizer) for side in ("train", "heldout"))
    random.Random(1).shuffle(train)
    random.Random(1).shuffle(heldout)
    pad = tokenizer.pad_token_id or 0
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).requires_grad_(False)
    full = full_gradients(base, batches(train[: BATCH * CALIBRATION], BATCH, pad))
    del base
    for name, config in configs(arguments.steps).items():
        if name not in results and (not arguments.only or name in arguments.only):
            results[name] = run(name, config, arguments, tokenizer, train, batches(heldout[:48], 16, pad), full)
            arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
