"""A first settings file for a model and data, with a word on each setting."""

from __future__ import annotations

from veneer.train import data

TEMPLATE = """\
# veneer plan {name}     shows what this will do
# veneer train {name}    does it
model: {model}
data:
  train: {train}
  format: {format}{columns}
  holdout: auto            # rows to measure on: a share, a number, or eval: other.jsonl
  max_length: 1024         # tokens in a row at most
  loss_on: auto            # {loss}
adapter:
  method: lora             # `veneer methods` lists them all
  r: 16
  lora_alpha: 32
  lora_dropout: 0.0
  target_modules: all-linear
train:
  epochs: 3
  batch_size: 4
  accumulate: 4            # 4 batches of 4 rows make one step
  learning_rate: auto
  schedule: linear
  warmup: 0.03             # share of the steps
  gradient_checkpointing: false
eval:
  every: auto              # steps; auto: five times in the run
  best: true               # end with the best checkpoint
  prompts: 3               # held-out prompts answered before and after
output: {out}
"""
LOSS = {
    "text": "the whole text is learnt",
    "messages": "every assistant turn is learnt, its end token included",
    "sharegpt": "every assistant turn is learnt, its end token included",
}


def write(model: str, files: list[str], out: str, name: str) -> str:
    """The settings as YAML.

    Raises:
        ValueError: the data fit no known format and no mapping can be guessed.
        FileNotFoundError: there are no such data.
    """
    columns = ""
    try:
        kind = data.load([f"{file}#50" if "#" not in file else file for file in files], bad="skip").format
    except ValueError as error:
        guess = str(error).partition("data: {columns: ")[2].rpartition("}")[0].rstrip("}")
        if not guess or "YOUR_" in guess:
            raise
        kind, columns = "prompt", f"\n  columns: {guess}}}"
    train = files[0] if len(files) == 1 else f"[{', '.join(files)}]"
    loss = LOSS.get(kind, "the answer is learnt, its end token included")
    return TEMPLATE.format(name=name, model=model, train=train, format=kind, columns=columns, loss=loss, out=out)
