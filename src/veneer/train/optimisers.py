"""Optimisers by name, ours and the Trainer's: whether there is one, and what it keeps."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable

from torch import Tensor
from transformers.training_args import OptimizerNames

from veneer.train.optim import OPTIMISERS

NUMBERS = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
"""Numbers of state for each trained one, by how an optimiser's name starts after ``paged_``; 2 for the others."""
SMALL = 4096
"""bitsandbytes keeps the state of tensors below this size in 32 bit."""


def check(name: str) -> None:
    """Refuse an optimiser that there is not, before anything is loaded.

    Raises:
        ValueError: an unknown name.
        ImportError: a package is missing; the sentence says how to install it.
    """
    known = [*OPTIMISERS, *(one.value for one in OptimizerNames)]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise ValueError(f"train.optimizer '{name}' is not known; {hint}")
    packed = name.startswith("paged_") or name.endswith("8bit") and "torch" not in name
    for wanted, package in ((packed, "bitsandbytes"), (name in ("adamw_torch_4bit", "adamw_torch_8bit"), "torchao")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ImportError(f"train.optimizer {name} needs the package {package}: pip install {package}.")


def state_bytes(name: str, trained: Iterable[Tensor]) -> int:
    """What an optimiser keeps for the tensors that train: blocks of 256 with a constant each where it keeps bytes."""
    plain = name.removeprefix("paged_")
    numbers = next((n for start, n in NUMBERS.items() if plain.startswith(start)), 2)
    total = 0.0
    for tensor in trained:
        size: float = 4 if plain.endswith("32bit") else tensor.element_size()
        if plain.endswith("8bit") and tensor.numel() >= SMALL:
            size = 1 + 4 / 256
        total += numbers * size * tensor.numel()
    return round(total)
