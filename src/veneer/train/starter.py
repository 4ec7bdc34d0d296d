"""A first settings file for a model and data, with a word on each setting. The data's columns choose the task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.train import data, formats, rows
from veneer.train.names import ENCODERS

TASKS = {
    "labels": "sequence-classification",
    "tags": "token-classification",
    "pairs": "embeddings",
    "preference": "dpo",
    "kto": "kto",
    "prompts": "grpo",
}
"""Format -> task; all other formats are answers to learn."""

TEMPLATE = """\
# veneer plan {name}     shows what this will do
# veneer train {name}    does it
task: {task:<22} # {what}
model: {model}
data:
  train: {train}
  format: {format}{columns}
  holdout: auto            # rows to measure on: a share, a number, or eval: other.jsonl
  max_length: {length:<12} # tokens in a row at most{loss}
{own}adapter:
  method: lora             # `veneer methods` lists them all
  r: 16
  lora_alpha: 32
  lora_dropout: 0.0
  target_modules: all-linear
train:
  epochs: 3
  batch_size: {batch}
  accumulate: {accumulate}            # {batches}
  learning_rate: auto
  schedule: linear
  warmup: 0.03             # share of the steps
  gradient_checkpointing: false
eval:
  every: auto              # steps; auto: five times in the run
  best: true               # end with the checkpoint of the best held-out score{metric}
  prompts: 3               # held-out {prompts} answered before and after
output: {out}
"""
WHAT = {
    "sft": "learn the answers; also seq2seq for encoder-decoders",
    "seq2seq": "learn to write the completions",
    "sequence-classification": "one class for a text",
    "token-classification": "a tag for each word",
    "embeddings": "texts that belong together lie together",
    "dpo": "prefer the chosen answers; orpo and reward read the same rows",
    "kto": "prefer answers that are good to those that are bad",
    "grpo": "try answers, and learn from their rewards",
}
LOSS = {
    "text": "the whole text is learnt",
    "messages": "every assistant turn is learnt, its end token included",
    "sharegpt": "every assistant turn is learnt, its end token included",
}
OWN = {
    "seq2seq": "seq2seq:\n  prefix: ''               # put before every source, such as 'summarize: '\n"
    "  max_target: 256          # tokens of a target at most\n",
    "sequence-classification": "classes:\n  balanced: false          # true: rare classes count as common ones do\n",
    "token-classification": "classes:\n  balanced: false          # true: rare tags count as common ones do\n",
    "embeddings": "embeddings:\n  pooling: mean            # or first, last\n"
    "  temperature: 0.05        # cosines are divided by it\n",
    "dpo": "preference:\n  beta: 0.1                # how near to the reference the model stays\n",
    "kto": "preference:\n  beta: 0.1                # how near to the reference the model stays\n",
    "grpo": "rl:\n  generations: 8           # answers to each prompt, compared with each other\n"
    "  max_new_tokens: 256      # tokens of an answer at most\n"
    "  rewards:                 # what an answer is worth: exact, number, regex, length, json, judge, model,\n"
    "    - {reward}  # or your own, file.py:function; each may have a weight\n",
}
METRICS = {
    "sequence-classification": "accuracy, f1 or loss",
    "token-classification": "f1, accuracy or loss",
    "embeddings": "accuracy, mrr or loss",
}
SHORT_ROWS = ("sequence-classification", "token-classification", "embeddings")


def write(model: str, files: list[str], out: str, name: str) -> str:
    """The settings as YAML.

    Raises:
        ValueError: the data fit no known format and no mapping can be guessed.
        FileNotFoundError: there are no such data.
    """
    about = _config_of(model)
    encoder = about.get("model_type") in ENCODERS and not about.get("is_decoder")
    kind, columns = _recognised(files, encoder)
    answers = kind in formats.ANSWERED or kind == "text"
    task = TASKS.get(kind, "sft")
    if kind in ("prompt", "alpaca") and about.get("is_encoder_decoder"):
        task = "seq2seq"
    short = task in SHORT_ROWS
    loss = LOSS.get(kind, "the answer is learnt, its end token included")
    mapping = ", ".join(f"{ours}: {yours}" for ours, yours in columns.items())
    batch, accumulate = (32 if task == "embeddings" else 16, 1) if short else (4, 4)
    return TEMPLATE.format(
        name=name,
        task=task,
        what=WHAT[task],
        model=model,
        train=files[0] if len(files) == 1 else f"[{', '.join(files)}]",
        format=kind,
        columns=f"\n  columns: {{{mapping}}}" if columns else "",
        length=256 if short else 1024,
        loss=f"\n  loss_on: auto            # {loss}" if answers and task == "sft" else "",
        own=OWN.get(task, "").replace("{reward}", _reward(files) if task == "grpo" else ""),
        batch=batch,
        accumulate=accumulate,
        batches=f"{accumulate} batch{'es' * (accumulate > 1)} of {batch} rows make one step",
        metric=f"\n  metric: auto             # which score: {METRICS[task]}" if task in METRICS else "",
        prompts="texts" if short else "prompts",
        out=out,
    )


def _recognised(files: list[str], encoder: bool) -> tuple[str, dict[str, str]]:
    """(format, columns to map) of the first rows; for an encoder, questions and answers are pairs of texts."""
    if encoder and (found := formats.recognise(_first(files), ("tags", "labels", "pairs"))):
        return found
    try:
        return data.load([file if "#" in file else f"{file}#50" for file in files], bad="skip").format, {}
    except ValueError:
        found = formats.recognise(_first(files))
        if found is None:
            raise
        return found


def _first(files: list[str]) -> dict[str, Any]:
    path, _ = next(rows.expand(files))
    row = next(iter(rows.read(path)), None)
    return row if isinstance(row, dict) else {}


def _reward(files: list[str]) -> str:
    """A first reward: the right answer where the data have one, else a length to stay within."""
    columns = _first(files).keys()
    right = next((name for name in ("answer", "completion", "solution", "target") if name in columns), None)
    return f"{{use: exact, options: {{column: {right}}}}}" if right else "{use: length, options: {most: 100}}"


def _config_of(model: str) -> dict[str, Any]:
    """The model's config, if it is on this machine."""
    file = Path(model) / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache  # takes a third of a second, and only here

        cached = try_to_load_from_cache(model, "config.json") if model.count("/") == 1 else None
        file = Path(cached) if isinstance(cached, str) else file
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
