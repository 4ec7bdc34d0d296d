"""Bottleneck adapters written by the AdapterHub library ``adapters`` 1.x, read as ours.

Its folder holds ``adapter_config.json`` (a dict ``config`` with the architecture) and ``pytorch_adapter.bin`` or
``adapter.safetensors`` with ``<place>.adapters.<name>.adapter_down.0`` and ``adapter_up``. Read are its
``double_seq_bn`` (Houlsby), ``seq_bn`` (Pfeiffer) and ``par_bn`` (parallel), for BERT-like and Llama-like models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.targets import walk
from veneer.hf.model import PeftModel
from veneer.hf.tasks import task_class
from veneer.methods.bottleneck import NON_LINEARITIES, BottleneckConfig

_KEY = re.compile(r"(?P<place>.*)\.adapters\.[^.]+\.(?P<part>adapter_down\.0|adapter_up)\.(?P<leaf>weight|bias)")
_PARTS = {"adapter_down.0": "bottleneck_down", "adapter_up": "bottleneck_up"}
_USUAL = {
    "residual_before_ln": True, "adapter_residual_before_ln": False, "ln_before": False, "ln_after": False,
    "original_ln_after": True, "phm_layer": False, "use_gating": False, "inv_adapter": None, "cross_adapter": False,
    "stochastic_depth": 0.0, "output_adapter": True,
}  # fmt: skip
"""The library's settings at which its adapters are what ours are."""


def load_adapterhub(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", task_type: str | None = None
) -> PeftModel:
    """A model with an AdapterHub adapter on it, ready to run, to train on and to save in our own format.

    Args:
        model: the base model; of the class the adapter was made for, or one with the same model inside.
        folder: what the library's ``save_adapter`` wrote.
        adapter_name: the name here.
        task_type: as in every config; picks the class of the result.

    Raises:
        FileNotFoundError: no such folder, or no weights in it.
        ValueError: no bottleneck adapter, one with options that ours do not have, or one for another model.
    """
    settings, tensors = _read(Path(folder))
    reads = _reading(settings, str(folder))
    placed = _placed(model, tensors, reads, str(folder))
    sizes = {t.shape[0] for key, t in placed.items() if key.endswith("bottleneck_down.weight")}
    if len(sizes) != 1:
        raise ValueError(f"The bottlenecks of {folder} have different widths ({sorted(sizes)}); one is supported.")
    config = BottleneckConfig(
        task_type=task_type,
        target_modules=sorted({key.rpartition(".bottleneck")[0] for key in placed}),
        placement={"output": "houlsby", "sum": "pfeiffer", "residual": "parallel"}[reads],
        bottleneck_size=sizes.pop(),
        non_linearity=settings["non_linearity"],
        scaling=settings.get("scaling", 1.0),
        bottleneck_dropout=settings.get("dropout", 0.0),
        reads=reads,
    )
    whole = task_class(config)(model, config, adapter_name)
    try:
        checkpoint.put(whole.base_model, adapter_name, {checkpoint.PREFIX + k: v for k, v in placed.items()})
    except BaseException:
        whole.base_model.unload()
        raise
    return whole.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter_config.json, so it is no adapter folder.")
    settings = PeftConfig.from_json_file(path).get("config")
    if not isinstance(settings, dict) or "non_linearity" not in settings:
        raise ValueError(
            f"{path} is no AdapterHub bottleneck adapter (its 'config' is {json.dumps(settings)[:60]}); PEFT's and "
            "veneer's own folders are read by PeftModel.from_pretrained."
        )
    if (folder / "adapter.safetensors").is_file():
        return settings, load_file(folder / "adapter.safetensors")
    weights = folder / "pytorch_adapter.bin"
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds neither adapter.safetensors nor pytorch_adapter.bin.")
    return settings, torch.load(weights, map_location="cpu", weights_only=True)


def _reading(settings: dict[str, Any], folder: str) -> str:
    """What the bottleneck reads, in the words of ``BottleneckConfig.reads``."""
    other = {k: settings[k] for k, usual in _USUAL.items() if k in settings and settings[k] != usual}
    parallel, summed, attention = (settings.get(k, False) for k in ("is_parallel", "original_ln_before", "mh_adapter"))
    if attention and (parallel or summed):
        other["mh_adapter"] = True
    if settings["non_linearity"] not in NON_LINEARITIES:
        other["non_linearity"] = settings["non_linearity"]
    if other:
        raise ValueError(f"{folder} uses options of the AdapterHub library that ours does not have: {other}.")
    return "residual" if parallel else "sum" if summed else "output"


def _placed(model: nn.Module, tensors: dict[str, Tensor], reads: str, folder: str) -> dict[str, Tensor]:
    """The tensors under our keys: a module's path here, and our parameter names."""
    modules = dict(walk(model))
    placed = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{folder} holds a tensor of no bottleneck adapter: {key}.")
        at = _site(modules, found["place"], reads)
        if at is None:
            raise ValueError(
                f"{type(model).__name__} has no place for {key}; the adapter is of another model, or of a family "
                "that is not known here (known are models built like BERT and like Llama)."
            )
        placed[f"{at}.{_PARTS[found['part']]}.{found['leaf']}"] = tensor
    return placed


def _site(modules: dict[str, nn.Module], place: str, reads: str) -> str | None:
    """The path here of the module that the library's ``place`` is about; heads put their model a name deeper."""
    block, _, last = place.rpartition(".")
    if last in ("attention_adapters", "output_adapters"):
        part = {"attention_adapters": "self_attn", "output_adapters": "mlp"}[last]
        wanted = f"{block}.{part}" if reads == "output" else block
    else:
        wanted = f"{place}.dense" if reads == "output" else place
    found = [p for p in modules if p == wanted or p.endswith("." + wanted) or wanted.endswith("." + p)]
    exact = [p for p in found if p == wanted] or [p for p in found if p.endswith("." + wanted)]
    chosen = exact or [p for p in found if p.count(".") >= 2]
    return chosen[0] if chosen else None
