"""Running a bare base model over calibration data: batches, progress, and the adapter it is for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from veneer.core.sites import Site
from veneer.engine.tuner import Tuner
from veneer.methods.lora import Lora, LoraConfig


def lora_config(tuner: Tuner, name: str) -> LoraConfig:
    """The adapter's settings.

    Raises:
        ValueError: it is no LoRA, or the model is merged.
    """
    tuner._require(name)
    config = tuner.configs[name]
    if not isinstance(config, LoraConfig):
        raise ValueError(f"Adapter '{name}' is {config.peft_type}; only the starts of LoRA are made by initialize().")
    if tuner.merged:
        raise ValueError(
            f"The model is merged ({', '.join(tuner.merged)}); call unmerge_adapter() before initialize()."
        )
    return config


def loras_of(tuner: Tuner, name: str) -> dict[Site, Lora]:
    """The adapter's parts by site (its trained copies and biases left out)."""
    return {a.site: a for _, a in tuner.adapters(name) if isinstance(a, Lora)}


def peek(dataloader: Iterable[Any], family: str) -> tuple[Iterator[Any], Any]:
    """(all batches, the first of them).

    Raises:
        ValueError: there is none.
    """
    batches = iter(dataloader)
    try:
        first = next(batches)
    except StopIteration:
        raise ValueError(f"The data loader for init_lora_weights='{family}' is empty.") from None
    return itertools.chain([first], batches), first


def shown(batches: Iterable[Any], whole: Iterable[Any], what: str, limit: int | None, show: bool) -> Iterable[Any]:
    """``batches`` under a progress bar."""
    known = [n for n in (limit, len(whole) if isinstance(whole, Sized) else None) if n is not None]
    return tqdm(batches, desc=what, total=min(known, default=None), disable=not show)


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a dict, a tuple of arguments, or a tensor, moved to where the model is."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    if isinstance(batch, list | tuple):
        return model(*(v.to(device) if isinstance(v, Tensor) else v for v in batch))
    return model(batch.to(device))


@contextlib.contextmanager
def bare(tuner: Tuner) -> Iterator[None]:
    """Within: the base model alone, in eval mode (no dropout)."""
    modes = {module: module.training for module in tuner.modules()}
    try:
        with tuner.disabled():
            tuner.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
