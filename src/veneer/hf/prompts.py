"""Running a model with prompts: text it has read already, as embeddings before the text or as a cache before it.

One path for all methods: ``read_before`` collects what each row of a batch has read (rows of a mixed batch may have
read different prompts, or none), ``forward`` puts it before the text, and ``veneer.hf.prompted_generation`` hands it to
``generate`` as a cache. Nothing of transformers is patched.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core import lean
from veneer.core import prompt as core_prompt
from veneer.core.prompt import Prompt
from veneer.engine.tuner import Tuner
from veneer.hf.prompt_cache import cached
from veneer.hf.prompt_rows import Before, everyone, read_before


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


# ---- forward --------------------------------------------------------------------------------------------------------
def forward(peft_model: nn.Module, prompt: Prompt, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The base model's forward with the active prompts read before the text.

    Raises:
        ValueError: packed rows or a mask that is no (batch, length) one, before which nothing can be put.
    """
    tuner: Tuner = peft_model.base_model  # type: ignore[assignment]
    model: Any = tuner.model
    given = dict(zip(lean.arguments(model), args)) | kwargs
    given = {k: v for k, v in given.items() if v is not None}
    inputs = {name: given.get(name) for p in everyone(tuner) for name in p.wants}
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
    with cached(model, own, before):
        output = tuner(**own)
    for one in everyone(tuner):
        output = one.after_forward(output, own)
    return output


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


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward names this argument."""
    return name in lean.arguments(model)


def _place(model: Any, own: dict[str, Any], given: dict[str, Any], before: Before, length: int) -> None:
    """Positions: left to the model, which counts from the first virtual token, unless the caller or the rows differ."""
    if "position_ids" not in given and not before.uneven:
        return
    own.pop("position_ids", None)
    if not takes(model, "position_ids"):
        return
    virtual = (before.mask.cumsum(1) - 1).clamp(min=0)
    start = before.mask.sum(1, keepdim=True)
    said = given.get("position_ids")
    text = torch.arange(length, device=virtual.device)[None] if said is None else said
    own["position_ids"] = torch.cat([virtual[:, before.cached :], start + text], 1)


def _pools_last(model: Any) -> bool:
    """Whether a classifier reads its answer off the last token, which it finds by the pad ids that a prompt hides."""
    return _one_label_a_row(model) and hasattr(model, "score") and takes(model, "position_ids")


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
    with cached(model, own, before):
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
