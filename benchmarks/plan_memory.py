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

WORDS = "the red rose and the green grass under a blue sky of the north ".split()
MODELS = {"tiny": (256, 704, 4, 4), "small": (512, 1408, 12, 8)}
CASES: list[tuple[str, str, str]] = [
    ("lora 4 x 128", "tiny", "--adapter.method lora --train.batch_size 4 --data.max_length 128"),
    ("lora 8 x 512", "tiny", "--adapter.method lora --train.batch_size 8 --data.max_length 512"),
    ("lora 4 x 256", "small", "--adapter.method lora --train.batch_size 4 --data.max_length 256"),
    ("lora 4 x 256 checkpointing", "small", "--adapter.method lora --train.batch_size 4 --data.max_length 256 --train.gradient_checkpointing true"),
    ("oft 4 x 256", "small", "--adapter.method oft --train.batch_size 4 --data.max_length 256"),
    ("lora 1 x 128", "real", "--adapter.method lora --train.batch_size 1 --data.max_length 128"),
    ("lora 4 x 256", "real", "--adapter.method lora --train.batch_size 4 --data.max_length 256"),
    ("lora 4 x 256 checkpointing", "real", "--adapter.method lora --train.batch_size 4 --data.max_length 256 --train.gradient_checkpointing true"),
    ("lora 2 x 256 nf4", "real", "--adapter.method lora --train.batch_size 2 --data.max_length 256 --model.quantize nf4"),
    ("dora 2 x 256", "real", "--adapter.method lora --adapter.use_dora true --train.batch_size 2 --data.max_length 256"),
    ("ia3 2 x 256", "real", "--adapter.method ia3 --train.batch_size 2 --data.max_length 256"),
    ("prompt_tuning 2 x 256", "real", "--adapter.method prompt_tuning --adapter.num_virtual_tokens 20 --train.batch_size 2 --data.max_length 256"),
]  # fmt: skip


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


def case(model: str, data: Path, out: Path, settings: str) -> tuple[dict[str, Any], int]:
    """(the plan's memory by part, the run's highest memory)."""
    common = f"--model {model} --data {data} --out {out} --data.holdout 0 --train.steps 2 --eval.prompts 0 --train.threads 1".split()
    words = [sys.executable, "-m", "veneer.cli", "COMMAND", *common, *settings.split()]
    words[3] = "plan"
    planned = json.loads(_json(_run([*words, "--json"])))
    words[3] = "train"
    _run([*words, "--log.progress", "off"])
    return planned["memory"], json.loads((out / "report.json").read_text())["peak_memory"]


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
    return done.stdout


def _json(text: str) -> str:
    return text[text.index("{") :]


def main() -> None:
    given = arguments(__doc__ or "", model="", only="")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = folder / "rows.jsonl"
        text = " ".join(WORDS * 80)
        data.write_text("\n".join(json.dumps({"text": f"{text} {i}"}) for i in range(64)))
        folders = {"real": given.model}
        rows = []
        print(f"{'case':44}{'plan, MB':>10}{'run, MB':>10}{'plan / run':>12}")
        for name, model, settings in CASES:
            label = f"{model} {name}"
            if (model == "real" and not given.model) or not any(one in label for one in given.only.split(",")):
                continue
            if model not in folders:
                folders[model] = str(folder / model)
                make_model(folder / model, MODELS[model])
            planned, used = case(folders[model], data, folder / f"out{len(rows)}", settings)
            rows.append({"case": label, "plan": planned, "used": used, "ratio": planned["total"] / used})
            print(
                f"{label:44}{planned['total'] / 1e6:10.0f}{used / 1e6:10.0f}{planned['total'] / used:12.2f}", flush=True
            )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan_memory.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
