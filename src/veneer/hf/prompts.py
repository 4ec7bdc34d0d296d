"""Running a model with prompts: text it has read already, as embeddings before the text or as a cache before it.

One path for all methods: ``read_before`` collects what each row of a batch has read (rows of a mixed batch may have
read different prompts, or none), ``forward`` puts it before the text, and ``veneer.hf.prompted_generation`` hands it to
``generate`` as a cache. Keys and values go in through transformers' public Cache classes; nothing of it is patched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from veneer.core import prompt as core_prompt
from veneer.core.prompt import KeysValues, Prompt
from veneer.engine.adapted import BASE
from veneer.engine.tuner import Tuner


def encode(text: str, name: str, kwargs: dict[str, Any]) -> list[int]:
    """The ids of a text's tokens, by the tokenizer of this name.

    Raises:
        ValueError: there is no such tokenizer, here or on the hub.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:
        raise ValueError(
            f"The tokenizer '{name}' (tokenizer_name_or_path), which the start from a text needs, cannot be loaded: "
            f"{error}."
        ) from error
    return tokenizer(text)["input_ids"]


core_prompt.encode = encode


@dataclass
class Before:
    """What the rows of a batch have read before their text.

    Attributes:
        embeds: (batch, E, dim), read as if it were text; or None.
        decoder: (batch, D, dim), the same for the decoder of an encoder-decoder.
        pairs: each layer's keys and values, (batch, heads, C, head_dim); or None.
        mask: (batch, C + E) ones where something stands; rows with shorter prompts begin with zeros.
        uneven: the rows have read different amounts.
    """

    embeds: Tensor | None
    decoder: Tensor | None
    pairs: KeysValues | None
    mask: Tensor
    uneven: bool

    @property
    def embedded(self) -> int:
        return 0 if self.embeds is None else self.embeds.shape[1]

    @property
    def cached(self) -> int:
        return 0 if self.pairs is None else self.pairs[0][0].shape[2]

    @property
    def length(self) -> int:
        """Tokens before the text, padding among them included."""
        return self.mask.shape[1]

    def repeated(self, times: int) -> Before:
        """For beams: each row that often, side by side."""

        def more(x: Tensor | None) -> Tensor | None:
            return None if x is None or times == 1 else x.repeat_interleave(times, 0)

        if times == 1:
            return self
        pairs = None if self.pairs is None else [(more(k), more(v)) for k, v in self.pairs]
        return Before(more(self.embeds), more(self.decoder), pairs, more(self.mask), self.uneven)  # type: ignore


def active(tuner: Tuner, name: str | None = None) -> list[Prompt]:
    """The prompts that are read, in order: of one row's adapter, or of all active adapters."""
    if name is not None:
        return [tuner.prompts[name]] if name in tuner.prompts else []  # type: ignore[list-item]
    return [tuner.prompts[n] for n in tuner.state.active if n in tuner.prompts]  # type: ignore[misc]


def read_before(tuner: Tuner, batch: int, device: torch.device, inputs: dict[str, Any]) -> Before:
    """Collect what ``batch`` rows have read before their text."""
    if tuner.state.route is None:
        parts = [_one(active(tuner), batch, inputs)]
        rows = [torch.arange(batch, device=device)]
    else:
        by_name = tuner.state.rows(batch, device)
        rows = list(by_name.values())
        parts = []
        for name, own in by_name.items():
            some = {k: v[own] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            parts.append(_one([] if name == BASE else active(tuner, name), len(own), some))
    embeds = _stacked([p[0] for p in parts], rows, batch, 1)
    decoder = _stacked([p[1] for p in parts], rows, batch, 1)
    layers = max((len(p[2]) for p in parts if p[2] is not None), default=0)
    pairs = [
        tuple(_stacked([None if p[2] is None else p[2][i][side] for p in parts], rows, batch, 2) for side in (0, 1))
        for i in range(layers)
    ] or None
    masks = [
        _marks([None if p[2] is None else p[2][0][0] for p in parts], rows, batch, 2, device),
        _marks([p[0] for p in parts], rows, batch, 1, device),
    ]
    lengths = {tuple(0 if x is None else x.shape[d] for x, d in ((p[0], 1), (p[2] and p[2][0][0], 2))) for p in parts}
    return Before(embeds, decoder, pairs, torch.cat(masks, 1), len(lengths) > 1)  # type: ignore[arg-type]


def _one(prompts: list[Prompt], batch: int, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Any]:
    """(embeddings, decoder's embeddings, keys and values) of several prompts read one after the other."""

    def joined(each: list[Any], dim: int) -> Tensor | None:
        found = [x for x in each if x is not None]
        return torch.cat(found, dim) if found else None

    embeds = joined([p.embeddings(batch, inputs) for p in prompts], 1)
    decoder = joined([p.decoder_embeddings(batch, inputs) for p in prompts], 1)
    caches = [c for c in (p.keys_values(batch, inputs) for p in prompts) if c is not None]
    pairs = [tuple(torch.cat([layer[i] for layer in layers], 2) for i in (0, 1)) for layers in zip(*caches)]
    return embeds, decoder, pairs or None


def _stacked(each: list[Tensor | None], rows: list[Tensor], batch: int, dim: int) -> Tensor | None:
    """One tensor for the batch out of each group's own, shorter ones with zeros before them."""
    some = [x for x in each if x is not None]
    if not some:
        return None
    if len(each) == 1:
        return some[0]
    longest = max(x.shape[dim] for x in some)
    shape = [batch, *some[0].shape[1:]]
    shape[dim] = longest
    whole = some[0].new_zeros(shape)
    for x, own in zip(each, rows):
        if x is not None:
            pad = (0, 0) * (x.dim() - 1 - dim) + (longest - x.shape[dim], 0)
            whole = whole.index_copy(0, own, F.pad(x, pad).to(whole.dtype))
    return whole


def _marks(each: list[Tensor | None], rows: list[Tensor], batch: int, dim: int, device: torch.device) -> Tensor:
    """(batch, longest): ones where ``_stacked`` has no padding."""
    longest = max((x.shape[dim] for x in each if x is not None), default=0)
    mask = torch.zeros(batch, longest, dtype=torch.long, device=device)
    for x, own in zip(each, rows):
        if x is not None:
            mask[own, longest - x.shape[dim] :] = 1
    return mask


# ---- forward --------------------------------------------------------------------------------------------------------
def forward(peft_model: nn.Module, prompt: Prompt, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The base model's forward with the active prompts read before the text.

    Raises:
        ValueError: packed rows or a mask that is no (batch, length) one, before which nothing can be put.
    """
    tuner: Tuner = peft_model.base_model  # type: ignore[assignment]
    model: Any = tuner.model
    given = dict(zip(inspect.signature(model.forward).parameters, args)) | kwargs  # type: ignore[arg-type]
    given = {k: v for k, v in given.items() if v is not None}
    inputs = {name: given.get(name) for p in _everyone(tuner) for name in p.wants}
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return tuner(**_further(given, cache))
    if model.config.is_encoder_decoder:
        return _forward_both(tuner, given, inputs)
    text = given["input_ids"] if "input_ids" in given else given.get("inputs_embeds")
    if text is None:
        raise ValueError("Give input_ids or inputs_embeds; a prompt stands before a text.")
    batch, length = text.shape[:2]
    before = read_before(tuner, batch, text.device, inputs)
    _check(tuner, given, length, before)
    own = _lengthened(model, given, text, before)
    with _cached(model, own, before):
        output = tuner(**own)
    for one in _everyone(tuner):
        output = one.after_forward(output, own)
    return output


def _everyone(tuner: Tuner) -> list[Prompt]:
    """All prompts that some row of this call reads."""
    if tuner.state.route is None:
        return active(tuner)
    return [p for name in dict.fromkeys(tuner.state.route) for p in active(tuner, name)]


def _further(given: dict[str, Any], cache: Any) -> dict[str, Any]:
    """A later step of a text whose cache holds the prompt already: only the mask may not know of it."""
    mask = given.get("attention_mask")
    text = given.get("input_ids", given.get("inputs_embeds"))
    if mask is not None and text is not None and mask.dim() == 2 and "decoder_input_ids" not in given:
        missing = cache.get_seq_length() + text.shape[1] - mask.shape[1]
        if missing > 0:
            given = given | {"attention_mask": F.pad(mask, (missing, 0), value=1)}
    return given


def _check(tuner: Tuner, given: dict[str, Any], length: int, before: Before) -> None:
    model: Any = tuner.model
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(
            "With a prompt, attention_mask must be (batch, length) ones and zeros, before which to put more."
        )
    packed = any(k.startswith("cu_seq_lens") or k == "seq_idx" for k in given)
    if positions is not None and positions.dim() == 2 and not packed:
        back = positions[:, 1:] < positions[:, :-1]
        packed = bool((back & mask[:, :-1].bool()).any() if mask is not None else back.any())
    if packed:
        raise ValueError(
            "Several texts are packed into one row, but a prompt stands before the first one alone; turn packing off "
            "(packing=False, padding_free=False) or use a method that sits at layers."
        )
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    rotary = any(getattr(config, k, None) for k in ("rope_parameters", "rope_theta", "rotary_dim", "alibi"))
    if limit and not rotary and before.length + length > limit:
        raise ValueError(
            f"A prompt of {before.length} tokens before a text of {length} exceeds the {limit} positions of "
            f"{type(model).__name__}; cut the text to {limit - before.length}."
        )


def _lengthened(model: Any, given: dict[str, Any], text: Tensor, before: Before) -> dict[str, Any]:
    """The call's arguments with the embeddings, mask, positions and labels of what stands before the text."""
    own, (batch, length) = dict(given), text.shape[:2]
    e = before.embedded
    own.pop("past_key_values", None)
    mask = given.get("attention_mask")
    mask = torch.ones(batch, length, dtype=torch.long, device=text.device) if mask is None else mask
    own["attention_mask"] = torch.cat([before.mask.to(mask), mask], 1)
    if e:
        embeds = given["inputs_embeds"] if "inputs_embeds" in given else model.get_input_embeddings()(text)
        own["inputs_embeds"] = torch.cat([before.embeds.to(embeds), embeds], 1)  # type: ignore[union-attr]
        own.pop("input_ids", None)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in given:
                own[name] = F.pad(given[name], (e, 0))
        for name in ("start_positions", "end_positions"):
            if name in given:
                own[name] = given[name] + e
        labels = given.get("labels")
        if labels is not None and labels.dim() == 2 and labels.shape[1] == length and not _one_label_a_row(model):
            own["labels"] = F.pad(labels, (e, 0), value=-100)
    _place(model, own, given, before, length)
    if e and _pools_last(model):
        _text_to_the_right(own, mask, e)
    return own


def _one_label_a_row(model: Any) -> bool:
    return "SequenceClassification" in type(model).__name__


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters  # type: ignore[arg-type]


def _place(model: Any, own: dict[str, Any], given: dict[str, Any], before: Before, length: int) -> None:
    """Positions: left to the model, which counts from the first virtual token, unless the caller or the rows differ."""
    if "position_ids" not in given and not before.uneven:
        return
    own.pop("position_ids", None)
    if not _takes(model, "position_ids"):
        return
    virtual = (before.mask.cumsum(1) - 1).clamp(min=0)
    start = before.mask.sum(1, keepdim=True)
    said = given.get("position_ids")
    text = torch.arange(length, device=virtual.device)[None] if said is None else said
    own["position_ids"] = torch.cat([virtual[:, before.cached :], start + text], 1)


def _pools_last(model: Any) -> bool:
    """Whether a classifier reads its answer off the last token, which it finds by the pad ids that a prompt hides."""
    return _one_label_a_row(model) and hasattr(model, "score") and _takes(model, "position_ids")


def _text_to_the_right(own: dict[str, Any], mask: Tensor, virtual: int) -> None:
    """Move right padding before the text, positions kept, so that the last column is each row's last token."""
    length = mask.shape[1]
    shift = length - 1 - (mask * torch.arange(1, length + 1, device=mask.device)).argmax(1, keepdim=True)  # (batch, 1)
    positions = own.get("position_ids")
    if positions is None:
        positions = torch.arange(virtual + length, device=mask.device).expand(mask.shape[0], -1)
    turned = (torch.arange(length, device=mask.device)[None] - shift) % length  # column -> the column it comes from

    def move(x: Tensor) -> Tensor:
        index = turned if x.dim() == 2 else turned[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, :-length], x[:, -length:].gather(1, index)], 1)

    own["position_ids"] = move(positions)
    for name in ("inputs_embeds", "attention_mask", "token_type_ids"):
        if name in own:
            own[name] = move(own[name])


# ---- encoder-decoders -----------------------------------------------------------------------------------------------
def _forward_both(tuner: Tuner, given: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """The encoder reads embeddings before its text; the decoder has a cache, or embeddings, before its own."""
    model: Any = tuner.model
    text = next(given[k] for k in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels") if k in given)
    before = read_before(tuner, text.shape[0], text.device, inputs)
    own = dict(given)
    if before.embeds is not None and "encoder_outputs" not in given:
        text = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
        own |= encoder_side(model, given, text, before)
        own.pop("input_ids", None)
    labels = given.get("labels")
    if "decoder_input_ids" not in given and "decoder_inputs_embeds" not in given and labels is not None:
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
        own["decoder_input_ids"] = shifted
    if before.decoder is not None:
        ids = own.pop("decoder_input_ids", None)
        embeds = own["decoder_inputs_embeds"] if ids is None else model.get_input_embeddings()(ids)
        own["decoder_inputs_embeds"] = torch.cat([before.decoder.to(embeds), embeds], 1)
        if labels is not None:
            own["labels"] = F.pad(labels, (before.decoder.shape[1], 0), value=-100)
    ahead = before.cached or (0 if before.decoder is None else before.decoder.shape[1])
    if ahead:
        read = next(own[k] for k in ("decoder_input_ids", "decoder_inputs_embeds") if k in own)
        mask = given.get("decoder_attention_mask")
        length = read.shape[1] - (0 if before.cached else ahead)
        mask = torch.ones(read.shape[0], length, dtype=torch.long, device=read.device) if mask is None else mask
        own["decoder_attention_mask"] = F.pad(mask, (ahead, 0), value=1)
    with _cached(model, own, before):
        return tuner(**own)


def encoder_side(model: Any, given: dict[str, Any], text: Tensor, before: Before) -> dict[str, Any]:
    """``inputs_embeds`` and ``attention_mask`` of an encoder whose text follows a prompt."""
    mask = given.get("attention_mask")
    mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device) if mask is None else mask
    embeds = text if text.dim() == 3 else model.get_input_embeddings()(text)
    return {
        "inputs_embeds": torch.cat([before.embeds.to(embeds), embeds], 1),  # type: ignore[union-attr]
        "attention_mask": torch.cat([before.mask[:, before.cached :].to(mask), mask], 1),
    }


# ---- keys and values ------------------------------------------------------------------------------------------------
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
def _cached(model: Any, own: dict[str, Any], before: Before) -> Iterator[None]:
    """Within: ``own`` hands the model a cache of the keys and values, also through layers that recompute theirs."""
    if before.pairs is None:
        yield
        return
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and _recomputes(m)]
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
