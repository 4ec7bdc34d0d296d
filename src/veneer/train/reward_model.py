"""A reward model, trained by ``task: reward``, as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from veneer.train import adapters, models
from veneer.train.config import Model
from veneer.train.document import read
from veneer.train.evaluate import base_of, pad_token


class RewardModel:
    """A number for each answer.

    Args:
        path: the output folder of a ``task: reward`` run.
        batch_size: answers at once.
        max_length: tokens of prompt and answer; what is longer loses its beginning.

    Raises:
        FileNotFoundError: there is no adapter in the folder.
        ValueError: it is the adapter of another task.
    """

    def __init__(self, path: str, batch_size: int = 8, max_length: int = 2048):
        self.batch_size, self.max_length = batch_size, max_length
        base = base_of(path)
        if str(adapters.read_config(path).task_type) != "SEQ_CLS":
            raise ValueError(f"'{path}' is no reward model; train one with task: reward.")
        recipe = Path(path) / "run.yaml"
        stored = read(recipe).values if recipe.is_file() else {}
        keep = stored.get("model", {"path": base})
        settings = Model.model_validate(
            {**(keep if isinstance(keep, dict) else {}), "path": base, "tokenizer": str(path)}
        )
        self.system = stored.get("data", {}).get("system")
        self.template = stored.get("data", {}).get("template", "chat")
        self.tokenizer = models.load_tokenizer(settings)
        config = AutoConfig.from_pretrained(base, num_labels=1, pad_token_id=pad_token(self.tokenizer))
        loaded = models.load_model(settings, None, "AutoModelForSequenceClassification", config)
        self.model: Any = adapters.load(loaded, path).eval()

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The model's numbers, prompt by prompt."""
        device = next(self.model.parameters()).device
        rows = [self._ids(*pair)[-self.max_length :] for pair in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            batch = self.tokenizer.pad({"input_ids": rows[start : start + self.batch_size]}, return_tensors="pt").to(
                device
            )
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            found += logits[:, 0].float().tolist()
        return found

    def _ids(self, prompt: str, completion: str) -> list[int]:
        if self.template != "chat":
            return self.tokenizer(prompt + completion)["input_ids"] + [self.tokenizer.eos_token_id]
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
