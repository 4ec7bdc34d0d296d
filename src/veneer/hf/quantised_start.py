"""LoRA models whose float base is quantised along with the adapter's start: QPiSSA and LoftQ, for real."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.core import quant
from veneer.core.nf4_linear import Nf4Linear, quantize_model
from veneer.engine.adapted import Adapted
from veneer.hf.state_dict import tuner_of
from veneer.methods.lora import Lora
from veneer.methods.lora_quantised import STARTS, rounded
from veneer.methods.lora_split import place
from veneer.ops.nf4 import BLOCK
from veneer.ops.nf4_bytes import Layout


@dataclass(frozen=True)
class StartError:
    """Relative distance of a layer's weight from the float one: the quantised weight alone, and with the adapter."""

    quantised: float
    start: float


def quantize_with_adapter(
    peft_model: Any,
    start: str = "qpissa",
    *,
    rounds: int = 5,
    adapter_name: str = "default",
    skip: Sequence[str] = (),
    block: int = BLOCK,
    double_quant: bool = True,
) -> dict[str, StartError]:
    """Put the float base of a model with a fresh LoRA adapter into NF4, for real, with A and B fitted to it.

    The layers that the adapter sits at become Q, and A and B start so that Q + s B A is near the float weight; the
    other linear layers are quantised as they are. The adapter fits this quantised base alone, so keep both: the base's
    ``state_dict()`` is packed, and loads into ``quantize_model`` of a model on the meta device.

    Args:
        peft_model: with a LoRA adapter that has not been trained, on a float base.
        start: "qpissa" (A and B take the leading part, the base the rest) or "loftq" (they take what rounding loses).
        rounds: alternations.
        adapter_name: the adapter.
        skip: names of further modules that stay as they are, as in ``quantize_model``.
        block: weights that share a constant.
        double_quant: quantise the constants as well.

    Returns:
        layer -> how far its weight is from the float one: quantised alone, and as it starts now.

    Raises:
        ValueError: an unknown start, an adapter other than a fresh LoRA, or layers that NF4 does not take.
    """
    if start not in STARTS:
        raise ValueError(f"start must be {' or '.join(map(repr, STARTS))}, not '{start}'.")
    tuner = tuner_of(peft_model)
    tuner._require(adapter_name)
    hosts = tuner.hosts(adapter_name)
    for host in hosts:
        _check_fresh(host, adapter_name)
    errors = {}
    for host in hosts:
        lora, site = host.adapters[adapter_name], host.site
        w = site.weight.detach().float()
        layout = Layout((site.out_features, site.in_features), block, double_quant)
        a, b, base = STARTS[start](w, lora.matrices()[0].shape[0], lora.scaling, rounds, layout)
        place(lora, a, b)
        layer = Nf4Linear.of(base.to(site.dtype), site.bias, block, double_quant).train(host.training)
        host.exchange((layer,))
        pair = lora.scaling * (lora.matrices()[1] @ lora.matrices()[0]).detach().float()
        alone, size = rounded(w, layout), float(w.norm())
        errors[site.path] = StartError(
            float((w - alone).norm()) / size, float((w - site.weight.float() - pair).norm()) / size
        )
    with contextlib.suppress(ValueError):  # every linear layer may have had the adapter
        quantize_model(tuner.model, skip=skip, block=block, double_quant=double_quant)
    tuner.model.is_quantized = tuner.model.is_loaded_in_4bit = True
    return errors


def _check_fresh(host: Adapted, name: str) -> None:
    lora, site = host.adapters[name], host.site
    if not isinstance(lora, Lora) or site.kind != "linear" or site.turned or quant.backend(site.module) is not None:
        raise ValueError(
            f"'{site.path}' needs a LoRA adapter on a float linear layer to be quantised along with it; it is a "
            f"{type(site.module).__name__} with {type(lora).__name__}."
        )
    if lora.residual is not None or lora.delta_weight().any():
        raise ValueError(
            f"The adapter '{name}' at '{site.path}' has started or been trained already; add it with "
            "init_lora_weights=True and quantise before training."
        )
