"""Functions inside ``peft`` that programs nevertheless import: merging, empty weights, dequantising, methods."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import quant
from veneer.engine.adapted import Adapted
from veneer.hf.auto import PARENTS
from veneer.hf.layer_face import PeftLayer
from veneer.hf.replicate import replicate
from veneer.hf.shown import ShownTensors
from veneer.methods.lokr import split


def check_adapters_to_merge(module: PeftLayer, adapter_names: list[str] | None = None) -> list[str]:
    """Of these adapters (default: the active ones), those that are not merged into this layer yet.

    Raises:
        ValueError: a str.
    """
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    wanted = module.active_adapters if adapter_names is None else adapter_names
    return [name for name in wanted if name not in module.merged_adapters]


def str_to_bool(value: str) -> int:
    """1 for yes, true, t, y, on, 1; 0 for no, false, f, n, off, 0.

    Raises:
        ValueError: another word.
    """
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value}")


def get_batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The number of rows of whichever is given.

    Raises:
        ValueError: neither is.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What is equal for two tensors of the same memory: device, address, size in bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """``torch.load`` of plain tensors."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def postprocess_past_key_value(past_key_values: Any) -> Any:
    """A cache of keys and values is every model family's here: it is given back as it is."""
    return past_key_values


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module, on request with the very same parameters."""
    twin = copy.deepcopy(module)
    if share_weights:
        for path, source in module.named_modules():
            twin.get_submodule(path)._parameters.update(source._parameters)
    return twin


def get_device_map(model: nn.Module) -> dict[str, Any] | None:
    """Where accelerate has put the parts of a model."""
    return getattr(model, "hf_device_map", None)


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The model's quantisation settings, if they are this method's."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if getattr(model, "quantization_method", None) == method else None


class BufferDict(ShownTensors):
    """Tensors by name that are moved with the module and are no parameters."""

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, persistent: bool = False):
        super().__init__({}, "_buffers")
        self.persistent = persistent
        self.update(buffers or {})

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=self.persistent)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def pop(self, name: str) -> Tensor:
        """Take one out."""
        value = self[name]
        del self[name]
        return value

    def clear(self) -> None:
        """Take all out."""
        self._buffers.clear()

    def update(self, buffers: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]]) -> None:
        """Put several in."""
        for name, value in dict(buffers).items():
            self[name] = value


# ---- empty weights, packed weights ----------------------------------------------------------------------------------
@contextlib.contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Within: modules are made with parameters (and, if asked, buffers) on the meta device."""
    from accelerate import init_empty_weights as empty

    with empty(include_buffers=bool(include_buffers)):
        yield


def skip_init_on_device(func: Callable) -> Callable:
    """Decorate a function so that what it makes is real, also within ``init_empty_weights``."""

    @functools.wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = nn.Module.register_parameter, nn.Module.register_buffer
        nn.Module.register_parameter, nn.Module.register_buffer = _REGISTER  # type: ignore[method-assign]
        try:
            return func(*args, **kwargs)
        finally:
            nn.Module.register_parameter, nn.Module.register_buffer = before  # type: ignore[method-assign]

    return run


_REGISTER = nn.Module.register_parameter, nn.Module.register_buffer


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers was set up for DeepSpeed's ZeRO-3 in this process."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: nn.Module | None = None) -> Iterator[None]:
    """Within: parameters that ZeRO-3 has taken apart are whole."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


def dequantize_module_weight(module: nn.Module) -> Any:
    """A layer's weight, unpacked where it is packed."""
    inner: Any = module.get_base_layer() if isinstance(module, Adapted) else module
    return quant.dense(inner, inner.weight) if quant.backend(inner) is not None else inner.weight


def get_layer_device_map(model: nn.Module) -> dict[int, Any] | None:
    """Number of a hidden layer -> its device, where accelerate has spread the model."""
    spread = getattr(model, "hf_device_map", None)
    if not spread or set(spread) == {""}:
        return None
    found = {}
    for path, device in spread.items():
        number = next((int(part) for part in path.split(".") if part.isdecimal()), None)
        if number is not None:
            found[number] = device
    return found


def map_cache_to_layer_device_map(model: nn.Module, cache: Any) -> None:
    """Move each layer's keys and values to where the layer is."""
    places = get_layer_device_map(model)
    for number, layer in enumerate(getattr(cache, "layers", ())) if places else ():
        layer.keys, layer.values = layer.keys.to(places[number]), layer.values.to(places[number])  # type: ignore[index]


# ---- methods --------------------------------------------------------------------------------------------------------
def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """LoKr's two factors of a dimension, the smaller first."""
    a, b = split(dimension, factor)
    return min(a, b), max(a, b)


def make_kron(w1: Tensor, w2: Tensor, scale: float = 1.0) -> Tensor:
    """``scale w1 (x) w2``; a kernel's dimensions are the second's own."""
    w1 = w1[(..., *[None] * (w2.dim() - w1.dim()))]
    return torch.kron(w1, w2.contiguous()) * scale


class DoraCaching:
    """Within: nothing changes. DoRA's norm is kept here as long as the weights stay, in evaluation and out of it."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> None:
        return None


class MontecloraTrainerMixin:
    """For a Trainer: adds the penalties that adapters state (MonteCLoRA's divergence among them) to the loss."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The Trainer's loss plus the penalties of the model's adapters for this forward."""
        found = super().compute_loss(model, inputs, return_outputs=True, **kwargs)  # type: ignore[misc]
        loss, outputs = found
        terms = [t for m in model.modules() if isinstance(m, Adapted) for a in m.adapters.values()
                 if (t := a.penalty()) is not None]  # fmt: skip
        loss = loss + sum(terms) if terms else loss
        return (loss, outputs) if return_outputs else loss


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """SHiRA's default choice of entries: ``r (in + out)`` of them, True in a mask shaped like the weight."""
    weight: Any = base_layer.weight
    generator = torch.Generator()
    if random_seed is not None:
        generator.manual_seed(random_seed)
    count = r * (weight.shape[0] + weight.shape[1])
    chosen = torch.randperm(weight.numel(), generator=generator)[:count]
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[chosen] = True
    return mask.view(weight.shape).to(weight.device)


def replicate_layers(model: nn.Module, layer_map: list[tuple[int, int]]) -> None:
    """Repeat ranges of a model's layers in place, with shared weights."""
    replicate(model, layer_map)


@contextlib.contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Within: the tensors of a layer that accelerate has parked elsewhere are where it runs."""
    hook: Any = getattr(layer, "_hf_hook", None)
    if hook is None or not hasattr(hook, "pre_forward"):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, torch.tensor([]))


def insert_adapter_name(state_dict: dict[str, Any], adapter_name: str, parameter_prefix: str) -> dict[str, Any]:
    """A file's keys as live names: ``a.lora_A.weight`` -> ``a.lora_A.default.weight``."""
    found = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(parameter_prefix)), None)
        found[key if at is None else ".".join([*parts[: at + 1], adapter_name, *parts[at + 1 :]])] = value
    return found


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository has a file; None where the hub cannot be asked."""
    from huggingface_hub import file_exists
    from huggingface_hub.utils import EntryNotFoundError, HFValidationError

    if str(os.environ.get("HF_HUB_OFFLINE", "0")).upper() in ("1", "ON", "YES", "TRUE"):
        return None
    try:
        return file_exists(repo_id, filename, **kwargs)
    except (EntryNotFoundError, HFValidationError):
        return False
    except Exception:  # whatever keeps the hub from answering
        return None


# ---- EVA's defaults -------------------------------------------------------------------------------------------------
def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a batch that is a dict."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Any], peft_config: Any) -> Tensor:
    """(row, position) of every token of a batch that counts: those with a label, or all that are not padding."""
    if not isinstance(model_input, dict):
        raise ValueError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    labels = model_input.get("labels")
    if peft_config.eva_config.use_label_mask and labels is not None:
        mask = mask & (labels != peft_config.eva_config.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows (tokens, in) of a layer's input that count."""
    while isinstance(layer_input, tuple | list):
        layer_input = layer_input[0]
    if layer_input.dim() > 2:
        layer_input = layer_input[model_input.T.unbind()]
    return layer_input


# ---- AutoPeftModel's imports ----------------------------------------------------------------------------------------
def get_default_import_allowlist() -> list[str]:
    """The libraries from which a config may name a base model's class."""
    return sorted(name.replace("_", "-") for name in PARENTS)


def check_import_allowlist(allowlist: Sequence[str], parent_name: str) -> None:
    """Refuse a library that is not on the list.

    Raises:
        ValueError: it is not.
    """
    if parent_name.partition(".")[0] not in [name.replace("-", "_") for name in allowlist]:
        raise ValueError(f"A base model may be imported from {', '.join(allowlist)}, and not from '{parent_name}'.")
