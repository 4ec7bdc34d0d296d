"""Adapters in a model that keeps its own class: for libraries that bring their own model wrapper."""

from __future__ import annotations

import copy
import warnings

from torch import Tensor, nn

import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core import registry
from veneer.core.config import PeftConfig
from veneer.core.prompt import Prompt
from veneer.engine.adapted import Adapted
from veneer.engine.targets import find, walk
from veneer.hf.tuner import PeftTuner, fill_defaults, tuner_class


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
    if held and not any(isinstance(module, Adapted) for module in model.modules()):
        held = None  # others take the wrapped layers out by themselves when they unload
        model.__dict__.pop("peft_config", None)
    tuner: PeftTuner = held[0] if held else tuner_class(str(peft_config.peft_type))(model)
    places = None if state_dict is None else [_place_of(key) for key in state_dict]
    only = None if places is None else {path for path, _ in places}
    wanted = peft_config if places is None else _aimed_at(peft_config, model, {path for path, own in places if own})
    tuner.inject(adapter_name, wanted, low_cpu_mem_usage=low_cpu_mem_usage, only=only)
    tuner.configs[adapter_name] = peft_config
    tuner.set_active(adapter_name, trainable=not peft_config.inference_mode)
    model.__dict__["_veneer_tuner"] = (tuner,)
    # Others keep their own count of a model's adapters there, and take entries out themselves.
    model.__dict__.setdefault("peft_config", {})[adapter_name] = peft_config
    return model


def _aimed_at(config: PeftConfig, model: nn.Module, paths: set[str]) -> PeftConfig:
    """The config with exactly these layers as its targets, and a warning where its own words mean others."""
    if not hasattr(config, "target_modules") or getattr(config, "target_parameters", None):
        return config
    own = copy.copy(config)
    layers = {path for path, _ in walk(model)} & paths
    try:
        fill_defaults(model, own)
        meant = {target.path for target in find(model, own, strict=False)}
    except ValueError:
        meant = set()
    if meant != layers:
        warnings.warn(
            "While injecting the adapter, an inconsistency was found between the config and the given state_dict: "
            f"target_modules means {sorted(meant - layers)[:4]} besides, and not {sorted(layers - meant)[:4]}. The "
            "layers of the state_dict are adapted.",
            stacklevel=3,
        )
    own.target_modules, own.exclude_modules, own.layers_to_transform = layers, None, None  # type: ignore[attr-defined]
    return own


def _place_of(key: str) -> tuple[str, bool]:
    """The layer that a file's key belongs to, and whether the tensor is a method's own (not a saved copy's)."""
    parts = key.removeprefix("base_model.model.").split(".")
    cut = next((i for i, p in enumerate(parts) if "_" in p and p.split("_")[0] in _prefixes()), None)
    path = ".".join(p for p in parts[: len(parts) - 1 if cut is None else cut] if p != "base_layer")
    return path, cut is not None


def _prefixes() -> set[str]:
    return {name.lower().split("_")[0] for name in registry.METHODS}
