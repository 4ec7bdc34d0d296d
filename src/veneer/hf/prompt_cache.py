"""Keys and values before a text, through transformers' public Cache classes, also in layers that are recomputed."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from veneer.core import lean
from veneer.core.prompt import KeysValues
from veneer.hf.prompt_rows import Before


def new_cache(model: Any, pairs: KeysValues | None, kind: type | None = None) -> Any:
    """A transformers cache for this model, holding ``pairs``."""
    from transformers import DynamicCache, EncoderDecoderCache

    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    cache: Any = (kind or DynamicCache)(config=text)
    fill(cache, model, pairs or [])
    return EncoderDecoderCache(cache, DynamicCache(config=text)) if config.is_encoder_decoder else cache


def fill(cache: Any, model: Any, pairs: KeysValues) -> None:
    """Put each layer's keys and values into an empty cache, in the dtype and on the device of its layer."""
    devices = _devices(model)
    for i, (keys, values) in enumerate(pairs):
        device = devices.get(i, keys.device)
        dtype = model.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        cache.update(keys.to(device, dtype), values.to(device, dtype), i)
    if isinstance(cache, _steady()):
        cache.filled = True


def _devices(model: Any) -> dict[int, torch.device]:
    """Layer -> its device, for a model that is spread over several."""
    spread = getattr(model, "hf_device_map", None) or {}
    if len(set(spread.values())) < 2:
        return {}
    found: dict[int, torch.device] = {}
    for module in model.modules():
        lead = next(module.parameters(), None)
        if isinstance(getattr(module, "layer_idx", None), int) and lead is not None and lead.device.type != "meta":
            found.setdefault(module.layer_idx, lead.device)
    return found


@contextlib.contextmanager
def cached(model: Any, own: dict[str, Any], before: Before) -> Iterator[None]:
    """Within: ``own`` hands the model a cache of the keys and values, also through layers that recompute theirs."""
    if before.pairs is None:
        yield
        return
    layers: list[Any] = [m for m in lean.inside(model) if m.__dict__.get("gradient_checkpointing") and _recomputes(m)]
    own["past_key_values"] = new_cache(model, before.pairs, _steady() if layers else None)
    if layers:
        own["use_cache"] = False
    before_forward = {layer: layer.__dict__.get("forward") for layer in layers}
    for layer in layers:
        cache = None if model.config.is_encoder_decoder else own["past_key_values"]
        layer.forward = functools.partial(_recomputed, layer, layer.forward, cache)
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, forward in before_forward.items():
            layer.gradient_checkpointing = True
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _recomputes(module: nn.Module) -> bool:
    """Whether this is a layer whose call transformers recomputes, and so without its cache."""
    return module.training and any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def _recomputed(layer: Any, forward: Any, cache: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer's forward, recomputed in the backward pass with the cache that it had.

    ``cache``: what a layer gets whose model drops its cache while it trains.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    names = list(inspect.signature(forward).parameters)
    if cache is not None and "past_key_values" in names:
        at = names.index("past_key_values")
        if at < len(args):
            args = (*args[:at], cache, *args[at + 1 :])
        else:
            kwargs["past_key_values"] = cache

    def run(*args: Any) -> Any:
        own, cache = kwargs, kwargs.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):  # the cross-attention's half begins empty each time
            own = kwargs | {"past_key_values": EncoderDecoderCache(cache.self_attention_cache, DynamicCache())}
        before, layer.gradient_checkpointing = layer.gradient_checkpointing, False
        try:
            return forward(*args, **own)
        finally:
            layer.gradient_checkpointing = before

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


@functools.cache
def _steady() -> Any:
    """A cache that gives what it holds and keeps nothing new: a layer that runs again sees what it saw."""
    from transformers import DynamicCache

    class SteadyCache(DynamicCache):
        filled = False

        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if not self.filled:
                return super().update(keys, values, layer_idx, *args, **kwargs)
            held = self.layers[layer_idx]
            return torch.cat([held.keys, keys], -2), torch.cat([held.values, values], -2)

    return SteadyCache
