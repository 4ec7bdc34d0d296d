"""Quantised bases as models: their original weights, and the dense model that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from veneer.core import quant
from veneer.engine.packed_merge import Way
from veneer.hf.architectures import input_table

MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")
"""What transformers (and ``quantize_model``) note on a quantised model."""


class OriginalWeights(Mapping[str, Tensor]):
    """Layer path -> the float weight that a folder of safetensors has for it, read when it is asked for.

    Args:
        folder: a folder, or one file.
        prefix: what a file's keys may have, or lack, before the model's own names (``model.base_model_prefix``).

    Raises:
        FileNotFoundError: no safetensors there.
    """

    def __init__(self, folder: str | Path, prefix: str = ""):
        self.folder, self.prefix = Path(folder).expanduser(), prefix
        files = [self.folder] if self.folder.is_file() else sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"'{self.folder}' holds no safetensors with the float weights of the base; give its path."
            )
        self._where = {key: file for file in files for key in _keys(file)}

    def key(self, path: str) -> str:
        """The file's name for a layer's weight.

        Raises:
            KeyError: it has none.
        """
        name = f"{path}.weight"
        for known in (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}"):
            if known in self._where:
                return known
        raise KeyError(f"The safetensors of '{self.folder}' hold no '{name}'.")

    def __getitem__(self, path: str) -> Tensor:
        key = self.key(path)
        with safe_open(self._where[key], framework="pt") as file:
            return file.get_tensor(key)

    def __contains__(self, path: object) -> bool:
        try:
            return bool(self.key(str(path)))
        except KeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def way_of(model: nn.Module, quantized: Any) -> Way | None:
    """``quantized`` of a merge, with a folder's name as the weights in it.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: neither a known word nor a folder that exists.
    """
    if isinstance(quantized, Path) or isinstance(quantized, str) and Path(quantized).exists():
        return OriginalWeights(quantized, getattr(model, "base_model_prefix", ""))
    return quantized


def dequantized(model: Any, originals: Any = None) -> Any:
    """``model`` with every packed layer made dense, in place, and no mark of having been quantised.

    Args:
        model: any model.
        originals: layer path -> original weight, to be used where it has one.
    """
    found = [(path, row) for path, module in model.named_modules() if (row := quant.backend(module)) is not None]
    for path, row in found:
        module = model.get_submodule(path)
        weight = row.dense(module)
        if isinstance(originals, Mapping) and path in originals:
            weight = originals[path].to(weight)
        if row.plain:
            module.weight = nn.Parameter(weight, requires_grad=False)
            continue
        layer = quant.dense_layer(module, weight, getattr(module, "bias", None))
        if not path:
            return _plain(layer, None)
        model.set_submodule(path, layer)
    _settle(model)
    for mark in MARKS:
        model.__dict__.pop(mark, None)
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return model


def _settle(model: Any) -> None:
    """Put layers that compute in a dtype of their own into the model's, as ordinary layers have it."""
    table = input_table(model)
    lead = next((p.dtype for p in (table or model).parameters() if p.is_floating_point()), None)
    for path, module in list(model.named_modules()):
        if isinstance(module, quant.CastLinear):
            model.set_submodule(path, _plain(module, lead))


def _plain(layer: nn.Linear, dtype: torch.dtype | None) -> nn.Linear:
    if not isinstance(layer, quant.CastLinear):
        return layer
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.to(dtype).train(layer.training)
