"""``generate`` after a prompt: the prompt is read once into a cache, and ids that stand for it go before the text.

transformers then believes that these ids are read already, which is the truth. They are the row's own first id over
again, so that penalties for repeated tokens see no new one, and they are cut off the answer.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.prompt import KeysValues, Prompt
from veneer.engine.tuner import Tuner
from veneer.hf import prompts
from veneer.hf.prompt_cache import fill, new_cache
from veneer.hf.prompt_rows import Before, everyone, read_before

_TEXT = ("input_ids", "inputs", "inputs_embeds")
_TENSORS = (*_TEXT, "attention_mask", "past_key_values", "decoder_input_ids", "streamer", "generation_config")


def generate(peft_model: nn.Module, prompt: Prompt, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The base model's ``generate`` with the active prompts read before the text.

    Raises:
        ValueError: no text, or a kind of cache that nothing can be read into beforehand.
    """
    tuner: Tuner = peft_model.base_model  # type: ignore[assignment]
    model: Any = tuner.model
    given = dict(zip(inspect.signature(model.generate).parameters, args)) | kwargs  # type: ignore[arg-type]
    wants = {name for p in everyone(tuner) for name in p.wants}
    inputs = {name: given.pop(name, None) for name in wants}
    given = {k: v for k, v in given.items() if v is not None or k not in _TENSORS}
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return model.generate(**given)  # type: ignore[operator]
    text = next((given[k] for k in _TEXT if k in given), None)
    if text is None:
        raise ValueError("Give input_ids (or inputs_embeds) to generate from; a prompt stands before a text.")
    with torch.no_grad():
        before = read_before(tuner, text.shape[0], text.device, inputs)
        if model.config.is_encoder_decoder:
            return _encoder_decoder(tuner, given, text, before)
        return _decoder(tuner, given, before)


def _decoder(tuner: Tuner, given: dict[str, Any], before: Before) -> Any:
    own = dict(given)
    model: Any = tuner.model
    if "inputs" in own:
        own["input_ids"] = own.pop("inputs")
    ids, embeds = own.get("input_ids"), own.get("inputs_embeds")
    length, beams = before.length, _beams(model, given)
    text: Any = ids if ids is not None else embeds
    mask = own.get("attention_mask")
    mask = _mask(model, text, ids) if mask is None else mask
    own["attention_mask"] = torch.cat([before.mask.to(mask), mask], 1)
    if ids is not None and ids.shape[1]:
        own["input_ids"] = torch.cat([ids[:, :1].expand(-1, length), ids], 1)
    if embeds is not None:
        own["inputs_embeds"] = F.pad(embeds, (0, 0, length, 0))
    _room(model, own, length if ids is not None else 0)
    _streamed(own, length)
    total = length + text.shape[1] + _new_tokens(model, own, length + text.shape[1])
    own["past_key_values"] = _read(tuner, before.repeated(beams), _empty(model, own, total))
    return _cut(model.generate(**own), length if ids is not None else 0)  # type: ignore[operator]


def _read(tuner: Tuner, before: Before, cache: Any) -> Any:
    """Read everything in ``before`` into ``cache``; the keys and values first, then the embeddings after them."""
    model: Any = tuner.model
    pairs = list(before.pairs or [])
    if before.embeds is not None:
        from transformers import DynamicCache

        whole = DynamicCache()
        fill(whole, model, pairs)
        embeds = before.embeds.to(model.get_input_embeddings().weight.dtype)
        arguments = {
            "inputs_embeds": embeds,
            "attention_mask": before.mask,
            "use_cache": True,
            "past_key_values": whole,
        }
        if prompts.takes(model, "position_ids"):
            arguments["position_ids"] = (before.mask.cumsum(1) - 1).clamp(min=0)[:, before.cached :]
        training, _ = model.training, model.eval()
        try:
            tuner(**arguments)
        finally:
            model.train(training)
        pairs = _pairs(whole)
    fill(cache, model, pairs)
    return cache


def _pairs(cache: Any) -> KeysValues:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _empty(model: Any, own: dict[str, Any], total: int) -> Any:
    """The empty cache that the caller gave, or asked for by ``cache_implementation``, or the usual one."""
    from transformers import DynamicCache, StaticCache

    given = own.pop("past_key_values", None)
    if given is not None:
        return given
    settings = own.get("generation_config") or model.generation_config
    kind = own.pop("cache_implementation", None) or settings.cache_implementation
    if settings.cache_implementation is not None:  # which the cache made here stands for now
        own["generation_config"] = copy.copy(settings)
        own["generation_config"].cache_implementation = None
    text = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    if kind is None or kind.startswith("dynamic"):
        return DynamicCache(config=text)
    if kind == "offloaded":
        return DynamicCache(config=text, offloading=True)
    if kind in ("static", "sliding_window", "hybrid", "offloaded_static"):
        return StaticCache(config=text, max_cache_len=total, offloading=kind.startswith("offloaded"))
    raise ValueError(
        f"cache_implementation='{kind}' cannot be used with a prompt, which must be read into the cache first; use "
        "'dynamic' or 'static', or give an empty cache object as past_key_values."
    )


def _setting(model: Any, own: dict[str, Any], name: str) -> Any:
    """A setting of this call to ``generate``: an argument, or the generation config's."""
    value = own.get(name)
    config = own.get("generation_config") or model.generation_config
    return getattr(config, name, None) if value is None else value


def _beams(model: Any, own: dict[str, Any]) -> int:
    """Rows of the running batch for each row of the text."""
    return max(_setting(model, own, "num_beams") or 1, _setting(model, own, "num_return_sequences") or 1)


def _room(model: Any, own: dict[str, Any], length: int) -> None:
    """Lengths that count the text from its start count the ids that stand for the prompt as well."""
    if _setting(model, own, "max_new_tokens") is None or "max_length" in own:
        said = _setting(model, own, "max_length")
        if said is not None:
            own["max_length"] = said + length
    if _setting(model, own, "min_length"):
        own["min_length"] = _setting(model, own, "min_length") + length


def _new_tokens(model: Any, own: dict[str, Any], start: int) -> int:
    new = _setting(model, own, "max_new_tokens")
    if new is not None:
        return new
    limit = _setting(model, own, "max_length")
    return max(limit - start, 1) if limit is not None else 20


def _mask(model: Any, text: Tensor, ids: Tensor | None) -> Tensor:
    """transformers' own guess where no mask is given: pad ids are padding, unless they end texts too."""
    ones = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    pad, eos = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    if ids is None or pad is None or pad in ends:
        return ones
    return ids.ne(pad).long() if bool((ids == pad).any()) else ones


class _Rest:
    """A streamer that is not shown the ids that stand for the prompt."""

    def __init__(self, streamer: Any, length: int):
        self.streamer, self.left = streamer, length

    def put(self, value: Tensor) -> None:
        if self.left:
            value, self.left = value[..., self.left :], 0
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


def _streamed(own: dict[str, Any], length: int) -> None:
    if own.get("streamer") is not None and "input_ids" in own:
        own["streamer"] = _Rest(own["streamer"], length)


def _cut(answer: Any, length: int) -> Any:
    if isinstance(answer, Tensor):
        return answer[:, length:]
    answer.sequences = answer.sequences[:, length:]
    return answer


# ---- encoder-decoders -----------------------------------------------------------------------------------------------
def _encoder_decoder(tuner: Tuner, given: dict[str, Any], text: Tensor, before: Before) -> Any:
    """The encoder reads embeddings before its text; a decoder's prompt is read once into its cache."""
    own = dict(given)
    model: Any = tuner.model
    if before.embeds is not None:
        own |= prompts.encoder_side(model, given, text, before)
        for name in ("input_ids", "inputs"):
            own.pop(name, None)
    if before.decoder is None and before.pairs is None:
        return model.generate(**own)  # type: ignore[operator]
    _single_prompt_length(before)
    start = model.generation_config.decoder_start_token_id
    start = model.generation_config.bos_token_id if start is None else start
    ids = own.get("decoder_input_ids")
    if ids is None:
        ids = torch.full((text.shape[0], 1), start, dtype=torch.long, device=text.device)
    elif bool((ids[:, 0] != start).any()):
        ids = F.pad(ids, (1, 0), value=start)
    length = before.cached or before.decoder.shape[1]  # type: ignore[union-attr]
    own["decoder_input_ids"] = F.pad(ids, (length, 0), value=start)
    _room(model, own, length)
    _streamed(own, length)
    times = _beams(model, given)
    if before.decoder is None:
        own["past_key_values"] = new_cache(model, before.repeated(times).pairs)
    else:
        own["past_key_values"] = _read_by_decoder(tuner, own, text, before, times)
    return _cut(model.generate(**own), length)  # type: ignore[operator]


def _read_by_decoder(tuner: Tuner, own: dict[str, Any], text: Tensor, before: Before, times: int) -> Any:
    model: Any = tuner.model
    encoder = {k: own.pop(k) for k in ("inputs_embeds", "input_ids", "inputs") if k in own}
    encoder = {("input_ids" if k == "inputs" else k): v for k, v in encoder.items()}
    mask = own.get("attention_mask")
    own["encoder_outputs"] = model.get_encoder()(**encoder, attention_mask=mask, return_dict=True)
    cache = new_cache(model, None)
    embeds = before.decoder.to(model.get_input_embeddings().weight.dtype)  # type: ignore[union-attr]
    tuner(
        encoder_outputs=own["encoder_outputs"], attention_mask=mask, decoder_inputs_embeds=embeds,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    if times > 1:
        cache.batch_repeat_interleave(times)
    return cache


def _single_prompt_length(before: Before) -> None:
    if before.uneven:
        raise ValueError(
            "An encoder-decoder cannot generate after decoder prompts of different lengths in one batch; split it."
        )
