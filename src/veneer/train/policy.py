"""TRL's trainers over an adapted model: what they train, what they compare with, and what they save.

A trainer of TRL is given the model inside, whose layers hold the adapter already, so that it does not matter which
library it takes adapters from. The reference is that same model with its adapter switched off, or with its adapter as
it was before the first step: never a second model.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from veneer.train.trainer import AdapterCheckpoints

Reference = Callable[[], AbstractContextManager]
"""Makes a context within which the adapted model is its own reference."""


def trl(name: str, task: str) -> Any:
    """A class of TRL.

    Raises:
        ImportError: TRL is missing, or has no such class; with its version.
    """
    try:
        library = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(f"task: {task} needs the package trl ({error}): pip install 'veneer[train]'.") from None
    found = getattr(library, name, None)
    if found is None:
        version = library.__version__
        raise ImportError(f"task: {task} needs {name}, which TRL {version} does not have: pip install -U trl.")
    return found


def bare(adapted: Any) -> Reference:
    """The base, untouched, also where the adapter's start was split off from it."""
    return adapted.disable_adapter


def as_now(adapted: Any) -> Reference:
    """The adapted model as it is at this moment: its trainable tensors are copied, and put back while it is asked."""
    trained = [p for p in adapted.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]

    @contextlib.contextmanager
    def reference() -> Iterator[None]:
        now = [p.detach().clone() for p in trained]
        with torch.no_grad():
            torch._foreach_copy_(trained, start)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(trained, now)

    return reference


class Inside:
    """Hands the trainer of TRL behind it the model inside the adapted one."""

    def __init__(self, model: Any, **options: Any):
        base = model.get_base_model()
        packed = getattr(base, "is_loaded_in_4bit", None)
        if packed:  # TRL would round the adapter's tensors to bfloat16
            base.is_loaded_in_4bit = False
        super().__init__(model=base, **options)  # type: ignore[call-arg]
        if packed:
            base.is_loaded_in_4bit = packed


class Policy(AdapterCheckpoints, Inside):
    """Stands before a trainer of TRL in a class' bases.

    Args:
        model: the adapted model.
        reference: the way to its reference.
        task: for error messages.
        options: the trainer's own.

    Raises:
        ValueError: the adapter is a prompt, which is put before the text and so is not inside.
    """

    adapted: Any = None

    def __init__(self, model: Any, reference: Reference, task: str, **options: Any):
        for config in model.peft_config.values():
            if config.is_prompt_learning:
                raise ValueError(
                    f"task: {task} trains adapters that sit in the model's layers, and {config.peft_type} puts a "
                    "prompt before the text; use another method, or task: sft or orpo."
                )
        self.adapted, self.reference = model, reference
        super().__init__(model=model, **options)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the adapter is saved with a card of its own."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, and the adapter's own penalty."""
        if model.training:
            self.tokens_seen += read(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        return self.penalised(loss) if isinstance(loss, Tensor) and loss.requires_grad else loss


def checkpointing(config: Any) -> dict[str, Any]:
    """What TRL sets otherwise than we do: checkpointing and bfloat16 are on there unless they are told."""
    wanted = config.train.gradient_checkpointing
    return {"bf16": False, "gradient_checkpointing": wanted, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def read(inputs: dict[str, Any]) -> int:
    """Tokens of a batch, padding left out."""
    names = (
        ("attention_mask", "KL_attention_mask") if "attention_mask" in inputs else ("prompt_mask", "completion_mask")
    )
    return sum(int(inputs[name].sum()) for name in names if name in inputs)


def measured(trainer: Any) -> dict[str, float]:
    """The trainer's own figures on its held-out rows, under their bare names, without telling its callbacks."""
    told, trainer.callback_handler.callbacks = trainer.callback_handler.callbacks, []
    try:
        found = trainer.evaluate()
    finally:
        trainer.callback_handler.callbacks = told
    left_out = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
    bare = {name.removeprefix("eval_"): value for name, value in found.items()}
    return {name: float(value) for name, value in bare.items() if name not in left_out}
