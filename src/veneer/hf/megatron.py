"""Megatron's parallel layers, for configs that say ``megatron_config``."""

from __future__ import annotations

import importlib
from typing import Any

from veneer.core.parallel import MEGATRON

ALLOWED = ("megatron.core",)
"""What ``megatron_core`` may name: nothing else is ever imported because a config says so."""


def allow(config: Any) -> None:
    """Have the parallel layers of Megatron recognised, where ``config`` is for a model that has them.

    Raises:
        ValueError: ``megatron_core`` names another module.
        ImportError: Megatron is not installed.
    """
    if not getattr(config, "megatron_config", None):
        return
    if config.megatron_core not in ALLOWED:
        raise ValueError(
            f"megatron_core is '{config.megatron_core}'; a config may only name {' or '.join(ALLOWED)}, for no other "
            "module is imported on its word."
        )
    try:
        layers = importlib.import_module(f"{config.megatron_core}.tensor_parallel")
    except ImportError as error:
        raise ImportError(
            "LoraConfig(megatron_config=...) is for Megatron's parallel layers, and the package is not installed: "
            "pip install megatron-core."
        ) from error
    MEGATRON[layers.ColumnParallelLinear] = "column"
    MEGATRON[layers.RowParallelLinear] = "row"
