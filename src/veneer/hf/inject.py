"""Adapters in a model that keeps its own class: for libraries that bring their own model wrapper."""

from __future__ import annotations

from torch import Tensor, nn

import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core import registry
from veneer.core.config import PeftConfig
from veneer.core.prompt import Prompt
from veneer.hf.tuner import PeftTuner, tuner_class


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Plant an adapter into ``model`` in place; the model stays what it was, its layers are wrapped.

    Args:
        peft_config: the method and its settings.
        model: any module; a second call adds a second adapter.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: leave its tensors on the meta device.
        state_dict: file keys; given, exactly the layers they name are adapted.

    Returns:
        The same model.

    Raises:
        ValueError: a prompt method (which no layer holds), or what ``Tuner.add`` refuses.
    """
    if issubclass(registry.of(peft_config.peft_type).build, Prompt):  # type: ignore[arg-type]
        raise ValueError(
            f"{peft_config.peft_type} is read before the text and sits at no layer; use get_peft_model instead."
        )
    held = model.__dict__.get("_veneer_tuner")
    tuner: PeftTuner = held[0] if held else tuner_class(str(peft_config.peft_type))(model)
    only = None if state_dict is None else {_path_of(key) for key in state_dict}
    tuner.inject(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage, only=only)
    tuner.set_active(*tuner.state.active or (adapter_name,), trainable=not peft_config.inference_mode)
    model.__dict__["_veneer_tuner"] = (tuner,)
    # Others keep their own count of a model's adapters there, and take entries out themselves.
    model.__dict__.setdefault("peft_config", {})[adapter_name] = peft_config
    return model


def _path_of(key: str) -> str:
    parts = key.removeprefix("base_model.model.").split(".")
    cut = next((i for i, p in enumerate(parts) if "_" in p and p.split("_")[0] in _prefixes()), len(parts) - 1)
    return ".".join(p for p in parts[:cut] if p != "base_layer")


def _prefixes() -> set[str]:
    return {name.lower().split("_")[0] for name in registry.METHODS}
