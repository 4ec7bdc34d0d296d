"""Small functions that other libraries import from ``peft``: preparation, signatures, names."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.adapter import Adapter
from veneer.core.config import PeftConfig
from veneer.core.prompt import Prompt
from veneer.engine.adapted import Adapted
from veneer.hf import hub
from veneer.hf.layer_face import PeftLayer
from veneer.hf.state_dict import tuner_of
from veneer.hf.tasks import PeftModel
from veneer.hf.tuner import PREFIXES, parameter_prefix


# ---- models with adapters, whatever class they have ---------------------------------------------------------------
def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, **kwargs: Any) -> None:
    """Make adapters of a model active, be they injected or under a ``PeftModel``."""
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    tuner_of(model).set_active(*names, trainable=not inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", **kwargs: Any) -> list[str] | None:
    """Take an adapter out; returns the names that are active then, None for none."""
    tuner = tuner_of(model)
    tuner.delete(adapter_name)
    return list(tuner.state.active) or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Whether adapters train, be they active or not."""
    tuner = tuner_of(model)
    for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
        tuner.set_trainable(name, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Bring an adapter's half-precision tensors to float32; tensors of a copied module keep their dtype."""
    if not autocast_adapter_dtype:
        return
    for module in model.modules():
        if isinstance(module, Adapted) and adapter_name in module.adapters:
            adapter = module.adapters[adapter_name]
            if not adapter.keeps_dtype and adapter.dtype in (torch.float16, torch.bfloat16):
                adapter.float()


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float | int) -> Iterator[None]:
    """Within: every scaled adapter acts ``multiplier`` times as strongly.

    Raises:
        TypeError: ``multiplier`` is no number.
        ValueError: the model has no layer with a scaling.
    """
    if not isinstance(multiplier, int | float):
        raise TypeError(f"multiplier must be a number, not a {type(multiplier).__name__}.")
    layers = [m for m in model.modules() if isinstance(m, PeftLayer) and m.each("scaling")]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layer with a scaling, so there is nothing to rescale.")
    before = [dict(layer.gains) for layer in layers]
    try:
        for layer in layers:
            for name in layer.each("scaling"):
                layer.set_gain(name, layer.gains.get(name, 1.0) * multiplier)
        yield
    finally:
        for layer, gains in zip(layers, before, strict=True):
            for name in layer.each("scaling"):
                layer.set_gain(name, gains.get(name, 1.0))


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within: nothing changes. An adapter casts its input to its own dtype, which is no cast where they agree."""
    yield


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or hub id holds an adapter."""
    try:
        hub.resolve(model_name_or_path, weights=False)
    except (FileNotFoundError, ValueError):
        return False
    return True


def update_forward_signature(model: PeftModel) -> None:
    """Show the base model's ``forward`` signature on a model whose own takes anything."""
    _show_signature(model, "forward", model.get_base_model().forward)


def update_generate_signature(model: PeftModel) -> None:
    """Show the base model's ``generate`` signature."""
    _show_signature(model, "generate", model.get_base_model().generate)


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Show the base model's signatures: "forward", "generate" or "all".

    Raises:
        ValueError: another ``method``.
    """
    known = {"forward": update_forward_signature, "generate": update_generate_signature}
    if method != "all" and method not in known:
        raise ValueError(f"method must be one of forward, generate, all, not '{method}'.")
    for name, update in known.items():
        if method in (name, "all"):
            update(model)


def _show_signature(model: PeftModel, name: str, source: Any) -> None:
    own = getattr(type(model), name)
    kinds = {p.kind for p in inspect.signature(own).parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL not in kinds and len(inspect.signature(own).parameters) > 3:
        return  # it says its arguments already

    @functools.wraps(source)
    def method(*args: Any, **kwargs: Any) -> Any:
        return own(model, *args, **kwargs)

    model.__dict__[name] = method


# ---- preparing a base model -----------------------------------------------------------------------------------------
def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    cast_to_float32: bool = True,
) -> Any:
    """Make a quantised base ready for adapters: frozen, what is not packed in float32, checkpointing on.

    Args:
        model: a base model; packed weights stay as they are.
        use_gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: default ``{"use_reentrant": False}``.
        auto_clear_cache: hand unused accelerator memory back afterwards.
        cast_to_float32: bring what is not packed (norms, embeddings, head, biases) from half precision to float32, as
            the peer does: steadier, and twice the bytes of these tensors. False leaves every dtype as it is.

    Raises:
        ValueError: gradient checkpointing for a model that does not offer it.
    """
    quantised = _is_quantised(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if cast_to_float32 and parameter.dtype in (torch.float16, torch.bfloat16) and not _is_packed(parameter):
            parameter.data = parameter.data.float()
    if use_gradient_checkpointing and quantised:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(
                f"{type(model).__name__} offers no gradient checkpointing; pass use_gradient_checkpointing=False."
            )
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or {"use_reentrant": False}
        )
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def _is_quantised(model: nn.Module) -> bool:
    marks = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized", "hf_quantizer")
    return any(bool(getattr(model, mark, False)) for mark in marks)


def _is_packed(parameter: nn.Parameter) -> bool:
    return type(parameter) is not nn.Parameter


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Trainable parameters in float32, frozen ones in ``dtype``: what AMP with half-precision weights wants."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels (batch, length) as decoder inputs: moved right by one, the start token first, -100 as padding.

    Raises:
        ValueError: no ``pad_token_id``.
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id is not set; set model.config.pad_token_id.")
    shifted = input_ids.roll(1, dims=-1)
    shifted[:, 0] = decoder_start_token_id
    return shifted.masked_fill(shifted == -100, pad_token_id)


def infer_device() -> str:
    """The accelerator of this machine, else "cpu"."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """A wrapping policy for FSDP1: trainable leaves by themselves, and the base's blocks that must not be split."""
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    names = getattr(model, "_no_split_modules", None) or ()
    blocks = {type(m) for m in model.modules() if type(m).__name__ in names}
    blocks |= {type(m) for m in model.modules() if isinstance(m, Prompt)}

    def trainable_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.children()) and weight is not None and weight.requires_grad

    policies = [functools.partial(lambda_auto_wrap_policy, lambda_fn=trainable_leaf)]
    policies.append(functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks))
    return functools.partial(_or_policy, policies=policies)


# ---- names and weights ----------------------------------------------------------------------------------------------
def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """``weight`` turned, if the layer stores it ``(in, out)``."""
    return weight.T if fan_in_fan_out else weight


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Keep one adapter from training."""
    tuner_of(model).set_trainable(adapter_name, False)


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """transformers' renamings from an adapter file's keys to the live names of the adapter's tensors here.

    transformers' own ``load_adapter`` writes a file's tensors by itself; this tells it where to.
    """
    from transformers.core_model_loading import WeightRenaming

    prefix = re.escape(parameter_prefix(str(peft_config.peft_type)) if peft_config is not None else "lora_")
    return [
        WeightRenaming(r"base_model.model.model.", "model."),
        WeightRenaming(r"base_model.model.", ""),
        WeightRenaming(r"lora_magnitude_vector$", "lora_magnitude_vector.weight"),
        WeightRenaming(rf"({prefix}[^\.]*)", rf"\1.{adapter_name}"),
        *(weight_conversions or []),
    ]


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Any = None) -> None:
    """Nothing to do: configs are resolved against the model as it is."""


def register_peft_method(
    *, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Enter a method of one's own, for this process; ``veneer.core.registry.method`` does the same.

    Args:
        name: in small letters; its ``peft_type`` is the same in capitals.
        config_cls: a ``LayerConfig``.
        model_cls: the ``Adapter`` (or ``Prompt``) class that is one layer's share of the method.
        prefix: what its parameters' names start with; default: ``<name>_``.
        is_mixed_compatible: taken for callers of the peer; every method that sits at layers is, here.

    Raises:
        ValueError: a name that is taken, or not in small letters.
        TypeError: ``config_cls`` is no config.
        NotImplementedError: a tuner class written for the peer, which wraps layers by itself; the sentence says what
            to write instead.
    """
    if name != name.lower():
        raise ValueError(f"The PEFT method name should be in lower case letters, not '{name}'.")
    peft_type = name.upper()
    if peft_type in registry.METHODS:
        raise ValueError(f"The PEFT method '{name}' exists already: choose another name.")
    if not issubclass(config_cls, PeftConfig):
        raise TypeError(f"config_cls must be a subclass of PeftConfig, not {config_cls.__name__}.")
    if not issubclass(model_cls, Adapter | Prompt):
        raise NotImplementedError(
            f"'{name}' cannot be registered with a tuner class ({model_cls.__name__}): here a method is one Adapter "
            "class, which any layer is wrapped with. Write it as veneer's docs/ecosystem.md and CONTRIBUTING.md show."
        )
    registry.method(peft_type, config_cls)(model_cls)
    if config_cls.type is None:
        config_cls.type = peft_type
    if prefix is not None:
        PREFIXES[peft_type] = prefix
