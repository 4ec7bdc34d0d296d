"""Multitask prompt tuning (Wang, Panda, Karlinsky, Feris, Sun, Kim, 2023, arXiv:2303.02861).

    P_t = P * (U_t V_t)        P (length, dim) shared, U_t (length, ranks), V_t (ranks, dim) for task t, * by element

First all source tasks train together; then a target task starts from the source file: from the mean of its factors
(AVERAGE_SOURCE_TASKS), from one task's (EXACT_SOURCE_TASK), or with fresh factors (ONLY_SOURCE_SHARED). Every call
says its rows' tasks: ``task_ids`` (batch,). An encoder-decoder has rows for its decoder too. The factors start at
N(0, 0.02), so the first prompt is small. Cost: ``length`` more tokens to read.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.core.prompt import Prompt
from veneer.core.registry import method
from veneer.methods.prompt_tuning import PromptTuningConfig, starting_table


class MultitaskPromptTuningInit(str, enum.Enum):
    """How the prompts start."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Settings of multitask prompt tuning.

    Attributes:
        prompt_tuning_init: RANDOM, TEXT, AVERAGE_SOURCE_TASKS, EXACT_SOURCE_TASK or ONLY_SOURCE_SHARED.
        prompt_tuning_init_state_dict_path: the source's file, for a start from it.
        prompt_tuning_init_task: the source task of EXACT_SOURCE_TASK.
        num_ranks: rank of each task's factors.
        num_tasks: number of tasks.

    Raises:
        ValueError: at ``get_peft_model``: a start from a source without its file, or numbers below 1.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM  # type: ignore[assignment]
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    type: ClassVar[str | None] = "MULTITASK_PROMPT_TUNING"
    starts: ClassVar[type[enum.Enum]] = MultitaskPromptTuningInit

    @property
    def from_source(self) -> bool:
        """Whether it starts from another file."""
        return "SOURCE" in self.prompt_tuning_init.value and not self.from_file  # type: ignore[union-attr]

    def check(self) -> None:
        """Refuse a source start without a source."""
        super().check()
        for name in ("num_ranks", "num_tasks"):
            if not getattr(self, name) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}.")
        path = self.prompt_tuning_init_state_dict_path
        if self.from_source and not path:
            raise ValueError(
                f"prompt_tuning_init='{self.prompt_tuning_init.value}' starts from another run: give its "  # type: ignore[union-attr]
                "adapter_model.safetensors as prompt_tuning_init_state_dict_path."
            )
        if self.from_source and not Path(path or "").is_file():
            raise ValueError(f"prompt_tuning_init_state_dict_path='{path}' is no file.")


@method("MULTITASK_PROMPT_TUNING", MultitaskPromptTuningConfig)
class MultitaskPrompt(Prompt):
    """One shared table, and low-rank factors for each task."""

    wants = frozenset({"task_ids"})

    def __init__(self, model: nn.Module, config: MultitaskPromptTuningConfig):
        super().__init__(model, config)
        rows, self.tasks = self.length * self.halves, config.num_tasks
        self.prompt_embeddings = nn.Parameter(starting_table(model, config, rows))  # (rows, dim)
        self.prefix_task_cols = nn.Parameter(torch.randn(config.num_tasks, rows, config.num_ranks) * 0.02)
        self.prefix_task_rows = nn.Parameter(torch.randn(config.num_tasks, config.num_ranks, config.token_dim) * 0.02)
        if config.from_source:
            self._start(config)

    def _start(self, config: MultitaskPromptTuningConfig) -> None:
        path = str(config.prompt_tuning_init_state_dict_path)
        source = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
        start = config.prompt_tuning_init.value  # type: ignore[union-attr]
        wanted = ["prompt_embeddings"]
        if start != "ONLY_SOURCE_SHARED":
            wanted += ["prefix_task_cols", "prefix_task_rows"]
        with torch.no_grad():
            for name in wanted:
                own, found = getattr(self, name), source.get(name)
                if found is not None and name != "prompt_embeddings":
                    task = config.prompt_tuning_init_task or 0
                    if start == "EXACT_SOURCE_TASK" and task >= len(found):
                        raise ValueError(f"prompt_tuning_init_task={task}, but {path} has {len(found)} tasks.")
                    found = found.mean(0, keepdim=True) if start.startswith("AVERAGE") else found[task : task + 1]
                if found is None or found.shape[-2:] != own.shape[-2:]:
                    have = "nothing" if found is None else f"the shape {tuple(found.shape)}"
                    raise ValueError(f"{path} has {have} for {name}, where {tuple(own.shape)} is needed.")
                own.copy_(found)

    def _task_prompts(self, batch: int, inputs: dict[str, Any]) -> Tensor:
        tasks = inputs.get("task_ids")
        if tasks is None:
            raise ValueError("Multitask prompt tuning must know each row's task: pass task_ids, (batch,) integers.")
        tasks = torch.as_tensor(tasks, device=self.prompt_embeddings.device).reshape(-1)
        if tasks.shape[0] != batch:
            raise ValueError(f"task_ids has {tasks.shape[0]} entries for a batch of {batch}; give one for each row.")
        return self.prompt_embeddings * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])

    def embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor:
        return self._task_prompts(batch, inputs)[:, : self.length]

    def decoder_embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor | None:
        return self._task_prompts(batch, inputs)[:, self.length :] if self.halves == 2 else None
