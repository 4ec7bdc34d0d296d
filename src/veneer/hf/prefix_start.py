"""Prefixes that start from what the model itself made of a text, and cartridges put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.config import PeftConfig
from veneer.core.prompt import join_layers
from veneer.engine import checkpoint
from veneer.hf.state_dict import tuner_of


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The table (length, 2 * layers * kv_heads * head_dim) of a cache's first tokens.

    Args:
        past_key_values: a cache of one row, or an iterable of each layer's (keys, values).
        num_virtual_tokens: how many of its tokens.

    Raises:
        ValueError: the cache holds fewer tokens, or several rows.
    """
    layers = getattr(past_key_values, "layers", None)
    pairs = [(x.keys, x.values) for x in layers] if layers is not None else [(p[0], p[1]) for p in past_key_values]
    keys = pairs[0][0] if pairs else None
    if keys is None or keys.dim() != 4 or keys.shape[0] != 1 or keys.shape[2] < num_virtual_tokens:
        found = "nothing" if keys is None else f"{keys.shape[0]} rows of {keys.shape[2]} tokens"
        raise ValueError(
            f"A start of {num_virtual_tokens} tokens needs a cache of one row with as many at least, not {found}; "
            "give a longer text or a smaller num_virtual_tokens."
        )
    n = num_virtual_tokens
    return join_layers([(k[:, :, :n].detach().float().cpu(), v[:, :, :n].detach().float().cpu()) for k, v in pairs])


def initialize_kv_prefix_from_past_key_values(
    model: nn.Module, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Start a prefix (or cartridge) from a cache; returns the table that was put in.

    Raises:
        ValueError: the adapter is no prefix, or the cache does not fit.
    """
    prompt = _prefix(model, adapter_name)
    n = prompt.length if num_virtual_tokens is None else num_virtual_tokens
    if n != prompt.length:
        raise ValueError(f"num_virtual_tokens={n}, but the adapter has {prompt.length}; leave it out.")
    table = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=n)
    own = prompt.incoming({"prompt_embeddings": table})
    expected = prompt.state_dict()
    wrong = [k for k, v in own.items() if k not in expected or expected[k].shape != v.shape]
    if wrong:
        raise ValueError(f"The cache gives a table of {tuple(table.shape)}, which does not fit this adapter.")
    prompt.load_state_dict(own)
    return table


def initialize_kv_prefix_from_text(
    model: nn.Module,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start a prefix (or cartridge) from the keys and values that the base model has for a text's first tokens.

    Args:
        model: a PeftModel with such an adapter.
        tokenizer: makes the tokens.
        text: at least ``num_virtual_tokens`` tokens long.
        adapter_name: default: the active one.
        num_virtual_tokens: default: the adapter's.
        use_chat_template: put the text as a user's message, where the tokenizer has a template for it.
        max_length: read no more than so many tokens of the text.

    Returns:
        The table that was put in.

    Raises:
        ValueError: the adapter is no prefix, or the text is too short.
    """
    _prefix(model, adapter_name)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(said, tokenize=True, add_generation_prompt=False, return_dict=True)[
            "input_ids"
        ]
    else:
        ids = tokenizer(text)["input_ids"]
    base = tuner_of(model)
    device = next(base.model.parameters()).device
    training = base.model.training
    with torch.no_grad(), base.disabled():
        base.model.eval()
        read = base.model(input_ids=torch.tensor([ids[:max_length]], device=device), use_cache=True)
        base.model.train(training)
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=read.past_key_values, num_virtual_tokens=num_virtual_tokens
    )


def _prefix(model: nn.Module, name: str | None) -> Any:
    tuner = tuner_of(model)
    name = name or next((n for n in tuner.state.active if n in tuner.prompts), None) or next(iter(tuner.configs))
    tuner._require(name)
    prompt: Any = dict(tuner.prompts.items()).get(name)
    if prompt is None or not prompt.whole or prompt.halves > 1:
        raise ValueError(f"'{name}' is no prefix of a decoder; only PREFIX_TUNING and CARTRIDGE start from a cache.")
    return prompt


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Write one cartridge that is several read one after the other.

    Args:
        adapter_paths: local folders.
        output_path: the new folder.
        safe_serialization: safetensors; False writes ``adapter_model.bin``.

    Raises:
        ValueError: none given, one that is no cartridge, or cartridges of different models.
    """
    if not adapter_paths:
        raise ValueError("Give at least one cartridge's folder in adapter_paths.")
    configs = [PeftConfig.read(path) for path in adapter_paths]
    for path, config in zip(adapter_paths, configs):
        if config.peft_type != "CARTRIDGE":
            raise ValueError(f"{path} holds a {config.peft_type} adapter, not a CARTRIDGE.")
    tables = [checkpoint.read(path)["prompt_embeddings"] for path in adapter_paths]
    if len({table.shape[1] for table in tables}) > 1:
        raise ValueError(f"The cartridges' tables are {[tuple(t.shape) for t in tables]}: of different models.")
    whole = configs[0]
    whole.num_virtual_tokens = sum(len(table) for table in tables)  # type: ignore[attr-defined]
    checkpoint.write(output_path, {"prompt_embeddings": torch.cat(tables)}, safe_serialization)
    whole.write(output_path)
