"""Adapters whose tensors lie in parts on several processes: gathered to be saved, cut up to be loaded.

FSDP2 (``fully_shard``) and tensor-parallel plans hold parameters as DTensors, DeepSpeed's ZeRO-3 as empty tensors that
are filled on demand. Only one adapter's own tensors are ever gathered, never the base's. Gathering is collective: every
process has to ask for it, in the same order, also those that write nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from veneer.core import lean
from veneer.core.parts import whole
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner


@contextlib.contextmanager
def filled(tuner: Tuner, name: str) -> Iterator[None]:
    """Within: the adapter's parameters that ZeRO-3 has taken apart are whole, and changes of rank 0 are kept.

    Raises:
        ImportError: parameters carry DeepSpeed's mark, but DeepSpeed cannot be imported.
    """
    split = [p for p in _parameters(tuner, name) if hasattr(p, "ds_id")]
    if not split:
        yield
        return
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(split, modifier_rank=0):
        yield


def kept(tuner: Tuner, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full values that outlive ``filled``, which takes the parameters apart again behind itself."""
    partitioned = any(hasattr(p, "ds_id") for p in _parameters(tuner, name))
    full = {key: whole(value) for key, value in tensors.items()}
    return {key: value.detach().clone() for key, value in full.items()} if partitioned else full


def require_whole(tuner: Tuner, name: str, tensors: dict[str, Tensor]) -> None:
    """Refuse to hand out parts as if they were the whole.

    Raises:
        ValueError: a tensor is empty, or a matrix of the adapter has been flattened (FSDP1, ZeRO-3 without DeepSpeed).
    """
    empty = [key for key, value in tensors.items() if value.numel() == 0]
    flat = [
        f"{prefix}{path}.weight"
        for prefix, holder, _ in checkpoint.holders(tuner, name)
        for path, module in holder.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.dim() < 2
    ]
    for keys, what in ((empty, "empty"), (flat, "flattened")):
        if keys:
            raise ValueError(
                f"The tensor {keys[0]} of adapter '{name}' is {what}: its parts lie on other processes, and a file "
                "without them would be useless. Shard with FSDP2 (fully_shard), or pass the gathered state_dict=."
            )


def refuse_late(model: nn.Module) -> None:
    """Refuse an adapter for a model that FSDP2 has sharded: its gradients would not be averaged between processes.

    Raises:
        ValueError: a module of the model has been through ``fully_shard``.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in lean.inside(model)):
        raise ValueError(
            "This model is sharded (fully_shard), and an adapter added now would stay outside: each process would "
            "train its own. Add the adapter first, then shard."
        )


def _parameters(tuner: Tuner, name: str) -> Iterable[nn.Parameter]:
    modules: list[nn.Module] = [host.adapters[name].holder for host in tuner.hosts(name)]
    modules += [table[name] for table in (tuner.shared, tuner.prompts) if name in table]
    inside = (part for module in modules for part in lean.inside(module))
    return {id(p): p for part in inside for p in part._parameters.values() if p is not None}.values()
