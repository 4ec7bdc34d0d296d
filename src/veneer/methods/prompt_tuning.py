"""Prompt tuning (Lester, Al-Rfou, Constant, 2021, arXiv:2104.08691).

    X' = [P ; E(X)]        P (length, dim) trained, E(X) (text, dim) the model's own embeddings

The table starts as normal draws of the embeddings' own size (RANDOM), as rows of the vocabulary (SAMPLE_VOCAB) or as a
text's embeddings (TEXT); the latter two learn much better. Encoder-decoders read the prompt in their encoder; their
file holds as many rows again, which the format asks for and nothing reads. Cost: ``length`` more tokens to read.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.prompt import Prompt, PromptLearningConfig, random_rows, text_rows, vocabulary_rows, vocabulary_size
from veneer.core.registry import method


class PromptTuningInit(str, enum.Enum):
    """How a prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Settings of prompt tuning.

    Attributes:
        prompt_tuning_init: RANDOM, SAMPLE_VOCAB (embeddings of random tokens) or TEXT.
        prompt_tuning_init_text: the text whose embeddings are the start.
        tokenizer_name_or_path: the tokenizer that reads it.
        tokenizer_kwargs: further arguments for that tokenizer.

    Raises:
        ValueError: at ``get_peft_model``: TEXT without a text or a tokenizer, or ``tokenizer_kwargs`` without TEXT.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    type: ClassVar[str | None] = "PROMPT_TUNING"
    starts: ClassVar[type[enum.Enum]] = PromptTuningInit

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [start.value for start in self.starts]
        said = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        if said not in known:
            raise ValueError(f"prompt_tuning_init must be one of {', '.join(known)}, not '{said}'.")
        self.prompt_tuning_init = self.starts(said)  # type: ignore[assignment]

    def check(self) -> None:
        """Refuse a start that lacks what it starts from."""
        super().check()
        text = self.prompt_tuning_init.value == "TEXT"  # type: ignore[union-attr]
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if text and not getattr(self, name):
                raise ValueError(
                    f"prompt_tuning_init='TEXT' needs {name} as well: the text and who makes tokens of it."
                )
        if self.tokenizer_kwargs and not text:
            raise ValueError("tokenizer_kwargs are for prompt_tuning_init='TEXT' alone; take them out.")
        if (self.tokenizer_kwargs or {}).get("trust_remote_code"):
            raise ValueError(
                "tokenizer_kwargs may not hold trust_remote_code: an adapter's settings run no code. Load the "
                "tokenizer once yourself and give its folder as tokenizer_name_or_path."
            )


def starting_table(model: nn.Module, config: Any, rows: int) -> Tensor:
    """(rows, dim): the prompt that a config's ``prompt_tuning_init`` asks for.

    A config that was read from a file asks for nothing: its table is in the file.
    """
    start = "RANDOM" if config.from_file else config.prompt_tuning_init.value
    if start == "TEXT":
        text, name, kwargs = config.prompt_tuning_init_text, config.tokenizer_name_or_path, config.tokenizer_kwargs
        return text_rows(model, text, name, kwargs, rows)
    if start == "SAMPLE_VOCAB":
        return vocabulary_rows(model, torch.randint(vocabulary_size(model), (rows,)))
    return random_rows(model, rows)


@method("PROMPT_TUNING", PromptTuningConfig)
class PromptTuning(Prompt):
    """A table of rows read before the text."""

    def __init__(self, model: nn.Module, config: PromptTuningConfig):
        super().__init__(model, config)
        self.prompt_embeddings = nn.Parameter(starting_table(model, config, self.length * self.halves))

    def embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor:
        return self.prompt_embeddings[: self.length].expand(batch, -1, -1)
