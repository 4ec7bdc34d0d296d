"""Which of ``ops`` run as Triton kernels, and the one place that decides it.

    found = kernel("nf4", data)          # a module of ``ops.triton``, or None: then the eager twin runs
    switch("nf4", False)                 # or VENEER_KERNELS_OFF=nf4,gather before the start; "all" for every one

A kernel is taken for plain CUDA tensors, outside ``torch.compile`` and ``torch.func``, whose tracers see the eager twin
instead. Its first use on a device in a dtype runs ``check`` of its module, which compares it with the twin, outputs and
gradients; one that does not compile or does not agree is left alone from then on, with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KERNELS = {
    "dropout": "a low-rank branch under dropout, whose mask is drawn anew wherever it is needed",
    "pair": "both gradients that a low-rank branch takes from its output's, in one reading of it",
    "gather": "low-rank branches of many adapters, each row of a batch with its own",
    "nf4": "unpacking of an NF4 weight",
    "nf4_rows": "the product of a few rows with an NF4 weight that is never unpacked",
}
"""Name -> what it computes. The module ``ops.triton.<name>`` holds it, with its ``check``."""

DEVICES = {"cuda"}
"""Types of devices that have kernels. Triton's interpreter serves "cpu" too, slowly: for tests."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""dtype -> how far a kernel may be from its twin, over the twin's largest value. Other dtypes have no kernels."""

_off: set[str] = set()
_found: dict[tuple[str, torch.device, torch.dtype], ModuleType | None] = {}


def kernel(name: str, *tensors: Tensor, dtype: torch.dtype | None = None) -> Any:
    """The kernels called ``name`` for these tensors, or None where the eager twin is to run.

    Args:
        name: a key of ``KERNELS``.
        tensors: what it is to work on; the first one tells device and dtype.
        dtype: in which it is to compute, where that is not the first tensor's.
    """
    device = tensors[0].device
    if device.type not in DEVICES or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    dtype = dtype or tensors[0].dtype
    if name in _off or dtype not in TOLERANCE or not all(type(t) in _PLAIN for t in tensors):
        return None
    key = name, device, dtype
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # compiling and comparing would break the capture
        _found[key] = _tried(name, device, dtype)
    return _found[key]


_PLAIN = (Tensor, torch.nn.Parameter)


def switch(name: str = "all", on: bool = True) -> None:
    """Turn a kernel (or "all") off, or on again; one that failed its check is tried anew.

    Raises:
        ValueError: there is no kernel of this name.
    """
    if name != "all" and name not in KERNELS:
        raise ValueError(f"There is no kernel '{name}'; there are: {', '.join(KERNELS)}, and 'all' for every one.")
    names = set(KERNELS) if name == "all" else {name}
    _off.difference_update(names) if on else _off.update(names)
    for key in [key for key in _found if key[0] in names]:
        del _found[key]


def report() -> dict[str, bool]:
    """Every kernel that was asked for until now, with device and dtype -> whether it runs."""
    return {f"{name} {device} {dtype}": module is not None for (name, device, dtype), module in _found.items()}


def _tried(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernel's module if its check succeeds."""
    try:
        module = importlib.import_module(f"veneer.ops.triton.{name}")
        with _undisturbed(device):
            far = module.check(device, dtype)
        exact = torch.get_float32_matmul_precision() == "highest"
        allowed = TOLERANCE[dtype] if exact else max(TOLERANCE[dtype], TOLERANCE[torch.float16])
        wrong = [what for what, distance in far.items() if not distance <= allowed]  # NaN is wrong too
        if not wrong:
            return module
        why = f"its {wrong[0]} is {far[wrong[0]]:.2g} of the largest value away from the eager twin's"
    except Exception as error:  # whatever a compiler or driver raises
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            _tell_absent()
            return None
        why = f"it failed with {type(error).__name__}: {str(error)[:500]}"
    warnings.warn(
        f"veneer's Triton kernel '{name}' ({KERNELS[name]}) is not used on {device} in {dtype}: {why}. "
        "The plain PyTorch form runs in its place: results are right, if slower. Please report this with the output of "
        f"`python -m torch.utils.collect_env`; VENEER_KERNELS_OFF={name} turns the kernel, and this warning, off.",
        RuntimeWarning,
        stacklevel=4,
    )
    return None


@functools.cache
def _tell_absent() -> None:
    warnings.warn(
        "The package triton is not installed, so veneer runs its plain PyTorch forms on this GPU: pip install triton, "
        "or set VENEER_KERNELS_OFF=all to do without.",
        RuntimeWarning,
        stacklevel=5,
    )


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """A check changes no random state, and no mode around it changes the check."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        yield


def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that launches kernels on its first tensor's device: Triton launches on the current one."""

    @functools.wraps(run)
    def launched(first: Tensor, *rest: Any, **named: Any) -> Any:
        with torch.cuda.device_of(first):
            return run(first, *rest, **named)

    return launched


def apart(found: Tensor, twin: Tensor) -> float:
    """How far two results are apart, over the twin's largest value."""
    found, twin = found.detach().double(), twin.detach().double()
    return float((found - twin).abs().max() / twin.abs().max().clamp_min(1e-30))


for _name in filter(None, os.environ.get("VENEER_KERNELS_OFF", "").split(",")):
    switch(_name.strip(), False)
