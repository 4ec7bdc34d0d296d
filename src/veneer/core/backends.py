"""How each library stores a quantised weight: one row a library, found by names, so that none need be installed.

A row whose library offers no function for it reads the weight by running the layer: W = (f(I) - f(0))^T, I the
identity, which any linear layer that has a forward pass answers.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import lean

Parameters = dict[str, nn.Parameter | None]


@dataclass(frozen=True)
class Backend:
    """How one library stores a weight.

    Attributes:
        name: the library and its format.
        matches: whether a module's weight is stored so.
        dense: module -> its weight (out, in), unpacked.
        packed: (module, dense weight) -> the parameters that store it, or None where the library packs only whole
            models, from calibration data.
        stored: the tensor that tells where the weight is.
        released: called before the module's parameters are exchanged.
        plain: a float parameter may take the packed one's place in the same module.
        casts: the layer computes in a dtype of its own and answers in that of its input.
    """

    name: str
    matches: Callable[[Any], bool]
    dense: Callable[[Any], Tensor]
    packed: Callable[[Any, Tensor], Parameters] | None = None
    stored: Callable[[Any], Tensor] = lambda module: module.weight
    released: Callable[[Any], None] | None = None
    plain: bool = False
    casts: bool = False

    def compute_dtype(self, module: Any) -> torch.dtype:
        """The dtype the layer computes in, as far as it says."""
        for owner, names in ((module, ("compute_dtype", "dtype")), (self.stored(module), ("dtype",))):
            for name in names:
                found = getattr(owner, name, None)
                if isinstance(found, torch.dtype) and found.is_floating_point:
                    return found
        floats = [t.dtype for t in [*module.parameters(), *module.buffers()] if t.dtype in _COMPUTES]
        return floats[0] if floats else torch.get_default_dtype()


_COMPUTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def library(name: str) -> Any:
    """A quantisation library.

    Raises:
        ImportError: it is not installed; the sentence says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"This weight needs the package {package}: pip install {package}.") from error


def _origin(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _weight_is(kind: str, origin: str) -> Callable[[Any], bool]:
    def matches(module: Any) -> bool:
        weight = module._parameters.get("weight")
        return type(weight).__name__ == kind and _origin(weight) == origin

    return matches


def _class_is(*names: str, has: str) -> Callable[[Any], bool]:
    return lambda module: (
        any(c.__name__ in names for c in type(module).__mro__) and isinstance(getattr(module, has, None), Tensor)
    )


@torch.no_grad()
def by_running(module: Any, *, first: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The weight (out, in) of any linear layer, from its answers to the identity and to zero."""
    lead = (first or _lead)(module)
    dtype = next((b.compute_dtype(module) for b in BACKENDS if b.matches(module)), torch.get_default_dtype())
    eye = torch.eye(module.in_features, dtype=dtype, device=lead.device)
    return (module(eye).float() - module(torch.zeros_like(eye[:1])).float()).T.to(dtype)


def _lead(module: Any) -> Tensor:
    return next(iter([*module.parameters(), *module.buffers()]))


# ---- ours -----------------------------------------------------------------------------------------------------------
NF4 = Backend(
    "veneer-nf4",
    _class_is("Nf4Linear", has="weight"),
    lambda module: module.dequantize(),
    lambda module, weight: {"weight": module.pack(weight)},
)


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------
def _dense_4bit(module: Any) -> Tensor:
    weight, functional = module.weight, library("bitsandbytes.functional")
    state = weight.quant_state
    if state is None:  # not packed before it is on its device
        return weight.data
    return functional.dequantize_4bit(*_arranged(weight))


def _arranged(weight: Any) -> tuple[Tensor, Any]:
    """Codes and constants in bitsandbytes' usual order: on a CPU, evaluation mode rearranges (and rounds) them."""
    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return library("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse(data, state)
    return data, state


def _packed_4bit(module: Any, weight: Tensor) -> Parameters:
    old = module.weight
    new = type(old)(
        weight.contiguous(), requires_grad=False, compress_statistics=old.compress_statistics, blocksize=old.blocksize,
        quant_type=old.quant_type, quant_storage=old.quant_storage,
    )  # fmt: skip
    return {"weight": new.to(weight.device)}


def _dense_8bit(module: Any) -> Tensor:
    weight, state = module.weight, module.state
    if weight.dtype != torch.int8:
        return weight.data
    codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (state.CB, state.SCB)
    return codes.float() * (scales.float() / 127)[:, None]


def _packed_8bit(module: Any, weight: Tensor) -> Parameters:
    new = type(module.weight)(weight.contiguous(), requires_grad=False, has_fp16_weights=module.state.has_fp16_weights)
    return {"weight": new.to(weight.device)}


def _released_8bit(module: Any) -> None:
    """Give a weight its scales back, which the layer takes over at its first call: they belong to this weight."""
    weight, state = module.weight, module.state
    if weight.CB is None and state.SCB is not None:
        weight.CB, weight.SCB = weight.data, state.SCB


BITSANDBYTES = (
    Backend("bitsandbytes-4bit", _weight_is("Params4bit", "bitsandbytes"), _dense_4bit, _packed_4bit, casts=True),
    Backend(
        "bitsandbytes-8bit", _weight_is("Int8Params", "bitsandbytes"), _dense_8bit, _packed_8bit,
        released=_released_8bit, casts=True,
    ),
)  # fmt: skip


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on a CPU in training mode, which changes nothing that they compute.

    In evaluation mode there they rearrange their weights for a faster kernel, and from then on their gradients are
    wrong (bitsandbytes 0.50: the input's gradient of SmolLM2 has nothing in common with the one before).
    """
    for module in lean.inside(model):
        weight: Any = module._parameters.get("weight")
        if type(weight) is nn.Parameter:
            continue
        if BITSANDBYTES[0].matches(module) and weight.device.type == "cpu":
            if weight.quant_state is not None:
                weight.data, weight.quant_state = _arranged(weight)
            module.train = functools.partial(_training, module)  # type: ignore[method-assign]
            module.train()


def _training(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, True)


# ---- torchao --------------------------------------------------------------------------------------------------------
def _is_torchao(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return _origin(weight) == "torchao" and hasattr(weight, "dequantize")


def _dense_torchao(module: Any) -> Tensor:
    weight = module.weight
    return weight.get_original_weight() if type(weight).__name__ == "NF4Tensor" else weight.dequantize()


def _packed_torchao(module: Any, weight: Tensor) -> Parameters:
    old, q = module.weight, library("torchao.quantization")
    kind = type(old).__name__
    if kind == "NF4Tensor":
        packed = library(type(old).__module__).to_nf4(weight.to(old.dtype), old.block_size, old.scaler_block_size)
        return {"weight": nn.Parameter(packed, requires_grad=False)}
    block = getattr(old, "block_size", None)
    group = block[-1] if block is not None and block[-1] < weight.shape[-1] else None
    if kind == "Int8Tensor":
        config = q.Int8WeightOnlyConfig() if group is None else q.Int8WeightOnlyConfig(granularity=q.PerGroup(group))
    elif kind == "IntxUnpackedToInt8Tensor":
        grain = q.PerAxis(0) if group is None else q.PerGroup(group)
        config = q.IntxWeightOnlyConfig(weight_dtype=old.target_dtype, granularity=grain)
    elif kind == "Float8Tensor":
        config = q.Float8WeightOnlyConfig()
    else:
        raise ValueError(f"No way is known to pack a weight as torchao's {kind} again; merge into a dequantised base.")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(old.dtype), requires_grad=False)
    q.quantize_(layer, config)
    return {"weight": layer.weight}


TORCHAO = Backend("torchao", _is_torchao, _dense_torchao, _packed_torchao, plain=True)


# ---- formats that are made from calibration data, or have no public way back ----------------------------------------
def _has(name: str) -> Callable[[Any], Tensor]:
    return lambda module: getattr(module, name)


def _dense_hqq(module: Any) -> Tensor:
    return module.dequantize()


def _quantised_by(origin: str, has: str) -> Callable[[Any], bool]:
    """A library's own layer class, whatever it calls it, by where it comes from and the tensor that it holds."""

    def matches(module: Any) -> bool:
        return any(c.__module__.partition(".")[0] == origin for c in type(module).__mro__) and isinstance(
            getattr(module, has, None), Tensor
        )

    return matches


BACKENDS: tuple[Backend, ...] = (
    NF4,
    *BITSANDBYTES,
    TORCHAO,
    Backend("hqq", _class_is("HQQLinear", has="W_q"), _dense_hqq, stored=_has("W_q")),
    Backend("gptqmodel", _quantised_by("gptqmodel", "qweight"), by_running, stored=_has("qweight"), casts=True),
    Backend("awq", _quantised_by("awq", "qweight"), by_running, stored=_has("qweight"), casts=True),
    Backend("aqlm", _class_is("QuantizedLinear", has="codes"), by_running, stored=_has("codes")),
    Backend("eetq", _class_is("EetqLinear", "W8A16Linear", has="weight"), by_running),
    Backend("gguf", _class_is("GGUFLinear", "GgufLinear", has="weight"), by_running),
)
"""Every library whose weights can be read here; the first row that matches serves."""
