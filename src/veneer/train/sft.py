"""Supervised fine-tuning of a causal language model: answers, conversations, or plain text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.hf import heads
from veneer.ops.linear_cross_entropy import LEAST
from veneer.train import data, models, packing
from veneer.train.config import RunConfig
from veneer.train.evaluate import answer, end_tokens, pad_token
from veneer.train.formats import ANSWERED
from veneer.train.names import ENCODERS
from veneer.train.tasks import Features, Losses, Material, Task, asked, asked_of, largest
from veneer.train.tokens import IGNORED, Renderer, Tokenised
from veneer.train.trainer import Collate, takes_kept_logits, token_losses

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared


class Sft(Task):
    """Learns the tokens of the answers; see ``tokens.Renderer``."""

    formats: tuple[str, ...] = (*ANSWERED, "text")

    def features(self, material: Material) -> Features:
        """Rendered and tokenised rows, packed if that is wanted."""
        config, options, tokenizer = material.config, material.config.data, material.tokenizer
        _writes(material.base, config)
        continues = data.continues(material.rows)
        renderer = Renderer(tokenizer, material.format, options.template, options.loss_on, options.system, continues)
        train = renderer.tokenise(material.rows, options.max_length, options.too_long)
        renderer.counts = type(renderer.counts)()
        held = renderer.tokenise(material.held, options.max_length, options.too_long)
        material.notices += _notices(train, config, material.format)
        fits(train, material.base, config)
        config.data = options.model_copy(update={"template": renderer.template, "loss_on": renderer.loss_on})
        feed = None
        if options.packing:
            packing.check(material.adapter)
            feed = packing.pack(train.rows, options.max_length)
        collate = Collate(pad_token(tokenizer), dtype=models.dtype_of(config.model, models.device_of(config.model)))
        return Features(train, held, collate, feed, renderer)

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """-log p of the learnt tokens."""
        return partial(token_losses, keep=takes_kept_logits(model), chunked=prepared.config.train.chunked_loss)

    def inputs(self, prepared: Prepared, model: Any) -> dict[str, Any]:
        """With a block mask for packed rows, and logits only where something is learnt."""
        rows, length = largest(prepared)
        shape = (rows, 1, length, length) if prepared.config.data.packing else (rows, length)
        inputs: dict[str, Any] = {"input_ids": torch.ones(rows, length, dtype=torch.long), "use_cache": False}
        inputs["attention_mask"] = torch.ones(shape, dtype=prepared.collate.dtype if len(shape) == 4 else torch.long)
        if takes_kept_logits(model):
            inputs["logits_to_keep"] = _learnt_places(prepared, rows, length)
        return inputs

    def rehearsal(self, prepared: Prepared, model: Any) -> Tensor:
        """As ``token_log_probs`` works, where it does: one chunk's logits, and the gradient of what the head reads."""
        if not prepared.config.train.chunked_loss or heads.whole(model) is not None:
            return super().rehearsal(prepared, model)
        weight = model.get_output_embeddings().weight
        flat = heads.before_head(model, **self.inputs(prepared, model)).flatten(0, -2)
        with torch.no_grad():
            part = flat[: max(LEAST, flat.numel() // len(weight))]
            F.linear(part, weight).float().log_softmax(-1).to(weight.dtype) @ weight
        return (flat * torch.zeros_like(flat)).sum()

    # ---- before and after -------------------------------------------------------------------------------------------
    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Prompts and the answers of the data."""
        source, found = asked_of(prepared), []
        for i in asked(prepared):
            learnt = [t for t in source.rows[i]["labels"] if t != IGNORED]
            expected = prepared.tokenizer.decode(learnt, skip_special_tokens=True)
            found.append((_shown(prepared, source.sources[i]), expected.strip()))
        return found

    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """What the model writes, by the likeliest token each time."""
        source = asked_of(prepared)
        special = [t for row in prepared.train.rows[:1] for t in row["labels"] if t in prepared.renderer.specials]
        ends = end_tokens(model, prepared.tokenizer, special[-1] if special else None)
        return [
            answer(
                model,
                prepared.tokenizer,
                prepared.renderer.prompt(source.sources[i]),
                max_new_tokens=prepared.config.eval.max_new_tokens,
                ends=ends,
                bos=prepared.renderer.bos,
            )
            for i in asked(prepared)
        ]

    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """How rows are rendered, and what of them is learnt."""
        train, options = prepared.train, prepared.config.data
        learnt = 100 * train.learnt / train.tokens
        return [
            ("format", f"{options.format}, rendered by {options.template}, learnt: {options.loss_on}"),
            ("tokens", f"{train.tokens:,} an epoch, {train.learnt:,} of them learnt ({learnt:.0f} %)"),
            ("end token", f"learnt in {train.counts['ends_learnt']:,} of {len(train):,} rows"),
        ]


def _writes(base: Any, config: RunConfig) -> None:
    """Refuse models that do not write from left to right; some would load, and learn to copy what they see."""
    other = None
    if getattr(base, "is_encoder_decoder", False):
        other = "an encoder and a decoder; it learns with task: seq2seq"
    elif base.model_type in ENCODERS and not getattr(base, "is_decoder", False):
        other = (
            "an encoder, which does not write; it learns sequence-classification, token-classification or embeddings"
        )
    if other:
        raise ValueError(f"The model '{config.model.path}' ({base.model_type}) is {other}.")


def _shown(prepared: Prepared, source: data.Example) -> str:
    if source.messages is None or prepared.renderer.template != "chat":
        return prepared.renderer.prompt(source).strip()
    return next((str(m["content"]) for m in reversed(source.messages) if m["role"] == "user"), source.question).strip()


def _learnt_places(prepared: Prepared, rows: int, length: int) -> int:
    """How many positions of the largest batch need logits: as many as the longest learnt stretch in any row."""
    longest = sorted(prepared.feed, key=lambda row: -len(row["input_ids"]))[:rows]
    places = {i for row in longest for i, label in enumerate(row["labels"]) if label != IGNORED}
    return min(length, max(1, len(places)))


def _notices(train: Tokenised, config: RunConfig, format: str) -> list[str]:
    counts, total, limit = train.counts, len(train.lengths), config.data.max_length
    texts = {
        "dropped_unlearnt": f"of {total} rows have no token to learn within data.max_length {limit} and were dropped.",
        "dropped_long": f"of {total} rows are longer than data.max_length {limit} and were dropped.",
        "truncated": f"of {total} rows are longer than data.max_length {limit} and were cut.",
        "split_at_boundary": "rows would have a token across the border of prompt and answer; it was split there.",
        "last_turn_only": "conversations are rewritten by the template as they go on; only their last answer counts.",
    }
    found = [f"{counts[key]} {text}" for key, text in texts.items() if counts[key]]
    unended = len(train) - counts["ends_learnt"]
    if unended > len(train) // 2 and format != "text":
        found.append(f"{unended} of {len(train)} rows do not learn an end token: the model may not know when to stop.")
    return found


def fits(train: Tokenised, base: Any, config: RunConfig) -> None:
    """Refuse a tokenizer that gives tokens which the model does not know.

    Raises:
        ValueError: it gives one.
    """
    largest_token = max(max(row["input_ids"]) for row in train.rows)
    text = base.get_text_config() if hasattr(base, "get_text_config") else base
    if (vocabulary := getattr(text, "vocab_size", None)) and largest_token >= vocabulary:
        raise ValueError(
            f"The tokenizer gives the token {largest_token}, and the model '{config.model.path}' knows only "
            f"{vocabulary} tokens; they do not belong together."
        )
