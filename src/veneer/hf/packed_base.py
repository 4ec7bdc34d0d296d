"""A base in our NF4 as a folder of its own, and with the adapter that was fitted to it: saved and loaded in one call.

transformers reads such a folder like any other once this module is imported: ``config.json`` says ``veneer_nf4``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.core.nf4_linear import Nf4Linear, nf4_layer
from veneer.engine.targets import walk
from veneer.hf.base_state import get_base_model_state_dict
from veneer.hf.model import PeftModel

FORMAT = "veneer_nf4"
BASE = "base"
"""Sub-folder of an adapter's folder for the base that it was fitted to."""


@register_quantization_config(FORMAT)
class Nf4Settings(QuantizationConfigMixin):
    """Which layers are packed, and how.

    Args:
        modules: their paths.
        block: weights that share a constant.
        double_quant: the constants are quantised as well.
    """

    def __init__(self, modules: list[str] | None = None, block: int = 64, double_quant: bool = True, **kwargs: Any):
        self.quant_method = FORMAT
        self.modules, self.block, self.double_quant = list(modules or ()), block, double_quant


@register_quantizer(FORMAT)
class Nf4Quantizer(HfQuantizer):
    """Makes room for packed layers before a folder's tensors are read."""

    requires_calibration = True
    """It only loads what ``save_quantized`` wrote; a float model is packed by ``quantize_model``."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        make_room(model, self.quantization_config)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Through adapters."""
        return True


def make_room(model: Any, settings: Any) -> Any:
    """Empty packed layers in the place of those that ``settings`` (of a config, or None) names; gives the model."""
    settings = settings.to_dict() if hasattr(settings, "to_dict") else settings or {}
    if settings.get("quant_method") == FORMAT:
        for path in settings["modules"]:
            layer = nf4_layer(model.get_submodule(path), settings["block"], settings["double_quant"])
            model.set_submodule(path, layer)
        model.is_quantized, model.is_loaded_in_4bit = True, True
    return model


def save_quantized(model: Any, folder: str | Path) -> None:
    """Write a model in our NF4, and its adapters where it has some, so that ``load_quantized`` gives it back.

    The adapters go where ``save_pretrained`` puts them, the base into the sub-folder ``base``, which they then name as
    theirs: ``veneer generate --adapter FOLDER`` needs nothing else. A model without adapters goes into the folder
    itself.

    Args:
        model: from ``quantize_model`` or ``quantize_with_adapter``.
        folder: made if need be.

    Raises:
        ValueError: the model has no layer in our NF4, or layers with different settings.
    """
    folder = Path(folder)
    if not isinstance(model, PeftModel):
        _save_base(model, model.named_modules(), model.state_dict(), folder)
        return
    base: Any = model.get_base_model()
    where = (folder / BASE).absolute()
    _save_base(base, walk(base), get_base_model_state_dict(model), where)
    named = {name: config.base_model_name_or_path for name, config in model.peft_config.items()}
    try:
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(where)
        model.save_pretrained(folder)
    finally:
        for name, before in named.items():
            model.peft_config[name].base_model_name_or_path = before


def _save_base(model: Any, modules: Any, tensors: dict[str, Any], folder: Path) -> None:
    layers = {path: module for path, module in modules if isinstance(module, Nf4Linear)}
    kinds = {(layer.layout.block, layer.layout.double) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(
            "The model has no layer in veneer's NF4; quantize_model makes them."
            if not kinds
            else f"The layers are packed in {len(kinds)} ways, and one folder holds one; quantise them alike."
        )
    (block, double), config = kinds.pop(), copy.deepcopy(model.config)
    config.quantization_config = Nf4Settings(list(layers), block, double)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_torch_state_dict(tensors, folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def load_quantized(folder: str | Path, auto: Any = AutoModelForCausalLM, **options: Any) -> nn.Module:
    """What ``save_quantized`` wrote: the base, with its adapter where there is one.

    Args:
        folder: of ``save_quantized``.
        auto: transformers' class that loads the base.
        options: for its ``from_pretrained``; ``is_trainable`` is the adapter's.

    Raises:
        FileNotFoundError: the folder holds no such model.
    """
    folder, trains = Path(folder), options.pop("is_trainable", False)
    inner = folder / BASE if (folder / BASE / "config.json").is_file() else folder
    if not (inner / "config.json").is_file():
        raise FileNotFoundError(f"'{folder}' holds no packed model; write one by save_quantized.")
    base = auto.from_pretrained(inner, **options)
    return base if inner == folder else PeftModel.from_pretrained(base, folder, is_trainable=trains)
