"""Adapter tensors under the file's keys: out of a model, into a model, off a disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.parts import is_cut, whole
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.hf import embeddings, hub, sharded
from veneer.methods.lora_calibrate import NEEDS_DATA


def tuner_of(model: nn.Module) -> Tuner:
    """The tuner of a PeftModel, of a tuner itself, or of a model that adapters were injected into.

    Raises:
        ValueError: the model has no adapters.
    """
    if isinstance(model, Tuner):
        return model
    inner = model.__dict__.get("_modules", {}).get("base_model")
    if isinstance(inner, Tuner):
        return inner
    injected = model.__dict__.get("_veneer_tuner")
    if injected is not None:
        return injected[0]
    raise ValueError(f"This {type(model).__name__} has no adapters; make it a PeftModel first.")


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
    convert: bool | None = None,
) -> dict[str, Tensor]:
    """One adapter's tensors under the keys of ``adapter_model.safetensors``, gathered where processes share them.

    Where the model is sharded (FSDP2, ZeRO-3), every process must call this, unless a gathered ``state_dict`` is given.

    Args:
        model: a PeftModel, a tuner, or a model that adapters were injected into.
        state_dict: a (gathered) state dict of the whole model to take the values from.
        adapter_name: the adapter.
        unwrap_compiled: accept keys with ``_orig_mod.`` in ``state_dict``.
        save_embedding_layers: "auto", True or False; see ``veneer.hf.embeddings``.
        convert: give an adapter whose start replaced base weights as a plain LoRA of rank 2r for the original base, as
            ``save_pretrained`` does. Default: as it is, in the shapes of its config, unless it was started from data.

    Raises:
        ValueError: no such adapter, or a tensor that is empty because its parts lie on other processes.
    """
    while unwrap_compiled and hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    tuner = tuner_of(model)
    tuner._require(adapter_name)
    if convert is None:
        convert = _must_convert(tuner, adapter_name, injected=hasattr(model, "_veneer_tuner"))
    values = whole if state_dict is None else _from_whole(model, state_dict)
    with sharded.filled(tuner, adapter_name):
        found = checkpoint.tensors(tuner, adapter_name, convert, values)
        tables = embeddings.saved_embeddings(tuner, adapter_name, save_embedding_layers)
        found |= {key: values(table) for key, table in tables.items()}
        found = sharded.kept(tuner, adapter_name, found)
        sharded.require_whole(tuner, adapter_name, found)
    if isinstance(model, Tuner) or hasattr(model, "_veneer_tuner"):
        own = checkpoint.SHARED_PREFIX if isinstance(model, Tuner) else checkpoint.PREFIX
        found = {k.removeprefix(own): v for k, v in found.items()}
    return found


def _from_whole(model: nn.Module, gathered: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Live tensor -> its value in a state dict of the whole model, matched by the live tensors' identity."""
    named = {_place(v): k for k, v in model.state_dict(keep_vars=True).items() if v.numel()}
    return lambda value: whole(gathered.get(named.get(_place(value), ""), value))


def _place(value: Tensor) -> int:
    """The address of a tensor's values, or of the first of them that this process holds."""
    return (value.to_local() if is_cut(value) else value).data_ptr()  # type: ignore[attr-defined]


def _must_convert(tuner: Tuner, name: str, injected: bool) -> bool:
    """Whether the raw tensors would be of no use: a start from data cannot be made again by who reads them."""
    from_data = getattr(tuner.configs[name], "init_lora_weights", None) in NEEDS_DATA
    if not from_data or all(getattr(a, "start_A", None) is None for _, a in tuner.adapters(name)):
        return False
    if injected:
        raise ValueError(
            f"Adapter '{name}' was started from data and fits only the base weights that came with it, which the "
            "folder that this model's own save_pretrained writes could not say; save it through PeftModel, or take it "
            "with convert=True together with veneer.engine.checkpoint.config."
        )
    return True


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    strict: bool = False,
) -> checkpoint.LoadReport:
    """Put tensors under file keys into one adapter; where it is sharded, full tensors, given on every process.

    Returns:
        A report with ``missing_keys`` and ``unexpected_keys``.

    Raises:
        ValueError: a mis-shaped tensor; with ``strict`` also a missing or unexpected one. Nothing is changed then.
    """
    tuner = tuner_of(model)
    tensors = dict(peft_model_state_dict)
    if isinstance(model, Tuner):
        tensors = {
            checkpoint.SHARED_PREFIX + k if not k.startswith("base_model.") else k: v for k, v in tensors.items()
        }
    elif hasattr(model, "_veneer_tuner"):
        tensors = {checkpoint.PREFIX + k if not k.startswith("base_model.") else k: v for k, v in tensors.items()}
    tables = embeddings.take_embeddings(tuner, adapter_name, tensors)
    with sharded.filled(tuner, adapter_name):
        report = checkpoint.put(tuner, adapter_name, tensors, strict, ignore_mismatched_sizes)
    embeddings.put_embeddings(tuner, tables)
    return report


def load_peft_weights(
    model_id: str,
    device: str | torch.device | None = None,
    key_mapping: dict[str, str] | None = None,
    **hub_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of an adapter folder or hub id, under their file keys.

    Raises:
        FileNotFoundError, ValueError: see ``veneer.engine.checkpoint.read``.
    """
    folder = hub.resolve(model_id, **hub_kwargs)
    return hub.renamed(checkpoint.read(folder, device or "cpu"), key_mapping)
