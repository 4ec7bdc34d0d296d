"""What is where: the state of every adapted layer, and of the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from veneer.core.nf4_linear import Nf4Linear
from veneer.core.quant import backend
from veneer.engine.adapted import Adapted
from veneer.engine.tuner import Tuner
from veneer.hf.layer_face import module_type

Irregular = Literal["irregular"]
"""Said in place of a value that is not the same everywhere."""


@dataclass
class TunerLayerStatus:
    """One adapted layer. ``requires_grad`` and ``devices`` are by adapter name."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The model: sums over its layers, and what they agree on; ``"irregular"`` where they do not."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapted layer of a ``PeftModel``, of its tuner, or of a model with adapters injected.

    Raises:
        TypeError: the adapter is a prompt, which sits at no layer.
        ValueError: the model has no adapters.
    """
    _, tuner = _parts(model)
    if tuner is not None and tuner.prompts and not any(True for _ in _wrappers(model)):
        raise TypeError("A prompt sits before the text, not at a layer, so there is no layer to report on.")
    layers = [_layer(name, host) for name, host in _wrappers(model)]
    if not layers:
        raise ValueError(
            f"No adapter layers found in the model: {type(model).__name__} has no adapters; make some with "
            "get_peft_model or inject_adapter_in_model."
        )
    return layers


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """What all layers of a model say together.

    Raises:
        TypeError: the adapter is a prompt, which sits at no layer.
        ValueError: the model has no adapters.
    """
    layers = get_layer_status(model)
    base, tuner = _parts(model)
    available = sorted({name for layer in layers for name in layer.available_adapters})
    configs = tuner.configs if tuner is not None else (getattr(base, "peft_config", None) or {})
    trainable, total = count(model)
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(tuner).__name__ if tuner is not None else "None",
        peft_types={name: str(config.peft_type) for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_same([layer.enabled for layer in layers]),
        active_adapters=_same([layer.active_adapters for layer in layers]),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _same([layer.requires_grad[name] for layer in layers if name in layer.requires_grad])
            for name in available
        },
        available_adapters=available,
        devices={name: sorted({d for layer in layers for d in layer.devices.get(name, [])}) for name in available},
        quantization_backend=_same(
            [layer.quantization_backend for layer in layers if layer.quantization_backend] or [None]
        ),
    )


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a packed 4-bit weight counts what it stands for, a shared one counts once."""
    trainable = total = 0
    for parameter in model.parameters():
        # Under DeepSpeed's ZeRO-3 the tensor here is empty and says its true size beside.
        n = parameter.numel() or getattr(parameter, "ds_numel", 0)
        if type(parameter).__name__ == "Params4bit":
            storage = getattr(parameter, "quant_storage", None)
            n = n * 2 * (storage.itemsize if storage is not None else 1)
        total += n
        trainable += n if parameter.requires_grad else 0
    total += sum(m.layout.values - m.weight.numel() for m in model.modules() if isinstance(m, Nf4Linear))
    return trainable, total


def _parts(model: nn.Module) -> tuple[nn.Module, Tuner | None]:
    """The base model and its tuner, if it has one."""
    if isinstance(model, Tuner):
        return model.model, model
    inner = getattr(model, "base_model", None)
    if isinstance(inner, Tuner):
        return inner.model, inner
    injected = model.__dict__.get("_veneer_tuner")
    return model, injected[0] if injected else None


def _wrappers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every adapted layer with its name, below the tuner in a ``PeftModel``; of nested wrappers, each one."""
    inner = getattr(model, "base_model", None)
    for name, module in (inner if isinstance(inner, Tuner) else model).named_modules():
        if isinstance(module, Adapted):
            yield name, module


def _layer(name: str, host: Adapted) -> TunerLayerStatus:
    row = backend(host.get_base_layer())
    return TunerLayerStatus(
        name=name,
        module_type=module_type(host),
        enabled=host.state.enabled,
        active_adapters=list(host.state.active),
        merged_adapters=list(host.merged_names),
        requires_grad={n: _trains(a) for n, a in host.adapters.items()},
        available_adapters=sorted(host.adapters),
        devices={n: sorted({str(p.device.type) for p in a.parameters()}) for n, a in host.adapters.items()},
        quantization_backend=row.name if row is not None else None,
    )


def _trains(adapter: Any) -> bool | Irregular:
    """Whether an adapter's tensors train; those that are never meant to do not count."""
    found = {p.requires_grad for n, p in adapter.named_parameters() if n not in adapter.fixed}
    return "irregular" if len(found) > 1 else found == {True}


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """The merged adapters, where each of them is merged at every layer that has it."""
    merged = list(dict.fromkeys(name for layer in layers for name in layer.merged_adapters))
    for layer in layers:
        if any(name in layer.available_adapters and name not in layer.merged_adapters for name in merged):
            return "irregular"
    return merged


def _same(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else "irregular"
