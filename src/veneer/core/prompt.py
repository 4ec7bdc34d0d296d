"""Prompt: text the model has read already, as trainable embeddings or as keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import PeftConfig, TaskType
from veneer.core.placed import Placed

KeysValues = list[tuple[Tensor, Tensor]]
"""For each layer its keys and values, ``(batch, heads, length, head_dim)`` each."""


@dataclass
class PromptLearningConfig(PeftConfig):
    """Settings that all prompt methods share. The sizes are read off the model and written down in the file.

    Attributes:
        num_virtual_tokens: length of the prompt.
        token_dim: width of the model; filled in.
        num_transformer_submodules: 2 for a prompt in encoder and decoder, else 1; filled in.
        num_attention_heads: heads of the model; filled in.
        num_layers: layers of the model; filled in.
        modules_to_save: modules that are trained whole and saved with the prompt, such as a head.

    Raises:
        ValueError: at ``get_peft_model``: no or a senseless ``num_virtual_tokens``.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    is_prompt_learning: ClassVar[bool] = True
    ensure_weight_tying: ClassVar[bool] = False

    def check(self) -> None:
        """Refuse a length that is none."""
        n = self.num_virtual_tokens
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"num_virtual_tokens must be a positive integer, not {n!r}; 8 to 128 are usual.")


@dataclass(frozen=True)
class Sizes:
    """What a prompt must know of its model, read off the model's own config."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int | None
    """The longest text the model can read, where it says so."""


def sizes(model: nn.Module) -> Sizes:
    """Read the sizes of a transformer.

    Raises:
        ValueError: the model has no config, or one that does not say the sizes.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()

    def read(*names: str, default: Any = None) -> Any:
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
        if default is not None:
            return default
        raise ValueError(
            f"A prompt cannot be put before {type(model).__name__}: its config says none of {', '.join(names)}. "
            "Prompt methods need a transformer with attention; use LoRA or a bottleneck for other models."
        )

    heads = read("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")
    width = read("hidden_size", "n_embd", "d_model", "dim")
    kv_heads = read("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads)
    if getattr(config, "multi_query", False) and getattr(config, "model_type", "") in ("falcon", "gpt_bigcode"):
        kv_heads = 1
    if not all(isinstance(n, int) for n in (heads, kv_heads)):
        raise ValueError(
            f"The layers of {type(model).__name__} differ in their heads ({kv_heads}); no prompt fits them."
        )
    head_dim = read("head_dim", "d_kv", default=width // heads)
    layers = read("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    context = next((n for k in ("max_position_embeddings", "n_positions") if (n := getattr(config, k, None))), None)
    return Sizes(width, layers, heads, kv_heads, head_dim, context)


class Prompt(Placed):
    """One prompt method's parameters for one model.

    A method overrides ``embeddings`` (rows read before the text) or ``keys_values`` (keys and values read before it).

    Args:
        model: the base model; only read.
        config: the settings; sizes that were left open are filled in.

    Attributes:
        length: number of virtual tokens.

    Raises:
        ValueError: the model's sizes cannot be read, they are not those that the config was made for, or the prompt
            leaves no room for text.
    """

    wants: ClassVar[frozenset[str]] = frozenset()
    """Names of the model's inputs (``task_ids``) that ``embeddings`` reads."""
    whole: ClassVar[bool] = False
    """The table is as wide as all layers' keys and values, not as the embeddings."""
    fixed: frozenset[str] = frozenset()
    """Names of own parameters that are saved but never trained."""
    length: int

    @classmethod
    def on(cls, model: nn.Module, config: Any) -> Prompt:
        """Build the prompt for this model."""
        return cls(model, config)

    def __init__(self, model: nn.Module, config: PromptLearningConfig):
        super().__init__()
        known = sizes(model)
        embedding = _input_embedding(model)
        self.at_device, self.at_dtype = embedding.weight.device, embedding.weight.dtype
        self.length = config.num_virtual_tokens or 0
        if known.context is not None and self.length >= known.context:
            raise ValueError(
                f"num_virtual_tokens={self.length} leaves no room in the context of {type(model).__name__}, which is "
                f"{known.context} tokens; choose fewer."
            )
        heads = known.kv_heads if self.whole else known.heads
        width = known.kv_heads * known.head_dim if self.whole else _width(embedding)
        self.halves = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
        found = {
            "token_dim": width,
            "num_attention_heads": heads,
            "num_layers": known.layers,
            "num_transformer_submodules": self.halves,
        }
        for name, value in found.items():
            said = getattr(config, name)
            if said is None:
                setattr(config, name, value)
            elif said != value and name != "num_attention_heads":
                raise ValueError(
                    f"The prompt was made for a model with {name}={said}, but {type(model).__name__} has {value}; "
                    "load it onto the model it was trained on, or leave the field out."
                )

    def embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor | None:
        """(batch, length, dim) rows read before the text (by the encoder, if there is one), or None."""
        return None

    def decoder_embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor | None:
        """(batch, length, dim) rows that the decoder of an encoder-decoder reads first, or None."""
        return None

    def keys_values(self, batch: int, inputs: dict[str, Any]) -> KeysValues | None:
        """Each (decoder) layer's keys and values that its self-attention sees before the text, or None."""
        return None

    def after_forward(self, output: Any, given: dict[str, Any]) -> Any:
        """The model's output, or the same with another loss. ``given``: what the model was called with."""
        return output


def _input_embedding(model: nn.Module) -> Any:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if embedding is None or not hasattr(embedding, "weight"):
        raise ValueError(
            f"{type(model).__name__} does not say where its input embedding is (get_input_embeddings), so nothing can "
            "be read before its text."
        )
    return embedding


def split_layers(table: Tensor, layers: int, heads: int, halves: int = 1) -> KeysValues:
    """A table of keys and values, layer by layer.

    Args:
        table: (batch, length, layers * 2 * heads * head_dim).
        layers: number of layers.
        heads: number of key-value heads.
        halves: 2 for an encoder-decoder. The file format of such tables gives layer l the entries 4l and 4l + 1,
            counted round the table of 2 * layers entries; we keep to it, or no file could change sides.

    Returns:
        (keys, values) of each layer, (batch, heads, length, head_dim).
    """
    entries = table.unflatten(-1, (2 * layers, heads, -1)).permute(2, 0, 3, 1, 4)  # (2 layers, batch, heads, length, d)
    step = 2 * halves
    return [(entries[step * i % (2 * layers)], entries[(step * i + 1) % (2 * layers)]) for i in range(layers)]


def join_layers(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``split_layers`` turned round, for one row: (1, heads, length, d) each to (length, 2 layers heads d)."""
    entries = torch.stack([x[0] for pair in pairs for x in pair])  # (2 layers, heads, length, d)
    return entries.permute(2, 0, 1, 3).flatten(1)


encode: Callable[[str, str, dict[str, Any]], list[int]] | None = None
"""(text, tokenizer's name, its kwargs) -> token ids; the floor that knows tokenizers fills it in."""


def text_rows(model: nn.Module, text: str, name: str, kwargs: dict[str, Any] | None, length: int) -> Tensor:
    """The model's embeddings of a text's tokens, repeated or cut to ``length``: (length, dim) in float32.

    Raises:
        ValueError: there is no tokenizer, or the text has no tokens.
    """
    if encode is None:
        raise ValueError(
            f"The start from a text needs the tokenizer '{name}', which veneer.hf loads: make the model with "
            "veneer.get_peft_model, or take another prompt_tuning_init."
        )
    ids = encode(text, name, kwargs or {})
    if not ids:
        raise ValueError(f"prompt_tuning_init_text={text!r} has no tokens; give a text that says something.")
    return vocabulary_rows(model, torch.tensor((ids * (length // len(ids) + 1))[:length]))


def vocabulary_rows(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's embeddings of these tokens, (tokens, dim) in float32."""
    embedding = _input_embedding(model)
    with torch.no_grad():
        return embedding(ids.to(embedding.weight.device)).detach().float().clone()


def vocabulary_size(model: nn.Module) -> int:
    """How many rows the model's input embedding has."""
    return _input_embedding(model).weight.shape[0]


def random_rows(model: nn.Module, rows: int) -> Tensor:
    """(rows, dim) normal draws as large as the model's own embeddings: N(0, 1) would drown the text in many models."""
    embedding = _input_embedding(model)
    if embedding.weight.device.type == "meta":
        return torch.randn(rows, _width(embedding))
    sample = vocabulary_rows(model, torch.arange(min(1000, embedding.weight.shape[0])))
    return torch.randn(rows, _width(embedding)) * sample.std().cpu()


def _width(embedding: Any) -> int:
    return int(getattr(embedding, "embedding_dim", embedding.weight.shape[-1]))
