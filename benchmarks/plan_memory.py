"""What `veneer plan` says a run needs, beside what `veneer train` then uses: each in a process of its own.

python benchmarks/plan_memory.py                                  # random Llamas of 7 and 60 M parameters
python benchmarks/plan_memory.py --model FOLDER_OF_SMOLLM2        # and a real model
python benchmarks/plan_memory.py --only nf4,checkpointing

The plan's figure is its total; the run's is the highest resident memory of its process, from the first import to the
report. Two steps of the longest batch are enough, since the second one has the optimiser's state.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, arguments

WORDS = ["the", "red", "rose", "and", "green", "grass", "under", "a", "blue", "sky", "of", "north"]
MODELS = {"tiny": (256, 704, 4, 4), "small": (512, 1408, 12, 8)}
CASES: list[tuple[str, str, int, int, str]] = [
    ("tiny", "lora", 4, 128, ""),
    ("tiny", "lora", 8, 512, ""),
    ("small", "lora", 4, 256, ""),
    ("small", "lora", 4, 256, "--train.gradient_checkpointing true"),
    ("small", "oft", 4, 256, ""),
    ("small", "lora", 2, 256, "--task dpo"),
    ("small", "lora", 2, 256, "--task orpo"),
    ("small", "lora", 2, 256, "--task reward"),
    ("small", "lora", 4, 256, "--task kto"),
    ("small", "lora", 8, 256, "--task sequence-classification"),
    ("real", "lora", 1, 128, ""),
    ("real", "lora", 4, 256, ""),
    ("real", "lora", 4, 256, "--train.gradient_checkpointing true"),
    ("real", "lora", 2, 256, "--model.quantize nf4"),
    ("real", "lora", 2, 256, "--adapter.use_dora true"),
    ("real", "ia3", 2, 256, ""),
    ("real", "prompt_tuning", 2, 256, "--adapter.num_virtual_tokens 20"),
]
"""(model, method, rows, tokens, further settings)"""


def make_model(folder: Path, shape: tuple[int, int, int, int]) -> None:
    """A random Llama with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, mlp, layers, heads = shape
    table = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=16384, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(folder: Path, settings: str) -> Path:
    """Rows for the task that the settings name; each is longer than any case takes."""
    text = " ".join(WORDS * 80)
    rows: list[dict[str, Any]] = [{"text": f"{text} {i}"} for i in range(64)]
    if "classification" in settings:
        rows = [{**row, "label": WORDS[i % 2]} for i, row in enumerate(rows)]
    elif "kto" in settings:
        rows = [{"prompt": WORDS[i % 9], "completion": text, "label": i % 2 == 0} for i in range(64)]
    elif "--task" in settings:
        rows = [{"prompt": WORDS[i % 9], "chosen": text, "rejected": f"blue {text}"} for i in range(64)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def case(model: str, data: Path, out: Path, settings: str) -> tuple[dict[str, Any], int]:
    """(the plan's memory by part, the run's highest memory)."""
    settings += f" --model {model} --data {data} --out {out}"
    settings += " --data.holdout 0 --train.steps 2 --eval.prompts 0 --train.threads 1"
    plan = _run("plan", *settings.split(), "--json")
    planned = json.loads(plan[plan.index("{") :])["memory"]
    _run("train", *settings.split(), "--log.progress", "off")
    return planned, json.loads((out / "report.json").read_text())["peak_memory"]


def _run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "veneer.cli", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"veneer {' '.join(words)} failed: {done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    given = arguments(__doc__ or "", model="", only="")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folders = {"real": given.model}
        rows = []
        print(f"{'case':62}{'plan, MB':>10}{'run, MB':>10}{'plan / run':>12}")
        for model, method, batch, length, more in CASES:
            label = f"{model} {method} {batch} x {length} {more}"
            if (model == "real" and not given.model) or not any(one in label for one in given.only.split(",")):
                continue
            if model not in folders:
                folders[model] = str(folder / model)
                make_model(folder / model, MODELS[model])
            settings = f"--adapter.method {method} --train.batch_size {batch} --data.max_length {length} {more}"
            planned, used = case(folders[model], make_data(folder, more), folder / f"out{len(rows)}", settings)
            total = planned["total"]
            rows.append({"case": label, "plan": planned, "used": used, "ratio": total / used})
            print(f"{label:62}{total / 1e6:10.0f}{used / 1e6:10.0f}{total / used:12.2f}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan_memory.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
