"""Fine-tuning of an encoder-decoder: the source goes into the encoder, the target is what the decoder learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.train import encoding
from veneer.train.config import RunConfig
from veneer.train.data import Example
from veneer.train.sft import fits
from veneer.train.tasks import Features, Losses, Material, Task, asked, asked_of, spelled
from veneer.train.tokens import IGNORED, Tokenised

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared


class Seq2Seq(Task):
    """Learns to write the completion of a prompt, or the output of an instruction."""

    adapter_type = "SEQ_2_SEQ_LM"
    auto = "AutoModelForSeq2SeqLM"
    formats = ("prompt", "alpaca")

    def features(self, material: Material) -> Features:
        """Source ids, and target ids as labels."""
        config, tokenizer, base = material.config, material.tokenizer, material.base
        if not getattr(base, "is_encoder_decoder", False):
            raise ValueError(
                f"The model '{config.model.path}' ({base.model_type}) has no encoder, so it cannot learn task seq2seq; "
                "task: sft is for such models."
            )
        encoding.limit(config, base, tokenizer, material.adapter)
        made = Features(_encoded(material.rows, tokenizer, config), _encoded(material.held, tokenizer, config))
        made.collate = encoding.Pad(tokenizer)
        material.notices += encoding.notices(made.train, config)
        if cut := made.train.counts["target_cut"]:
            material.notices.append(
                f"{cut} of {len(made.train)} targets are longer than seq2seq.max_target {config.seq2seq.max_target} "
                "and were cut: the model does not learn how they end."
            )
        fits(made.train, base, config)
        return made

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """-log p of the target's tokens."""
        return target_losses

    # ---- before and after -------------------------------------------------------------------------------------------
    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Sources and their targets."""
        sources = asked_of(prepared).sources
        return [(source_of(sources[i], prepared.config), str(sources[i].completion)) for i in asked(prepared)]

    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """What the model writes, by the likeliest token each time."""
        rows = [asked_of(prepared).rows[i]["input_ids"] for i in asked(prepared)]
        return [_written(model, prepared.tokenizer, ids, prepared.config.eval.max_new_tokens) for ids in rows]

    def respond(
        self, config: RunConfig, tokenizer: Any, model: Any, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """``answer``, what the decoder writes."""
        texts = [config.seq2seq.prefix + str(row["text"]) for row in rows]
        encoded, _ = encoding.encode(tokenizer, texts, None, config.data.max_length)
        longest = config.seq2seq.max_target
        return [{"answer": _written(model, tokenizer, row["input_ids"], longest)} for row in encoded]

    # ---- the plan ---------------------------------------------------------------------------------------------------
    def inputs(self, prepared: Prepared, model: Any) -> dict[str, Any]:
        """Sources and targets of the largest batch."""
        targets = max(len(row["labels"]) for row in prepared.feed)
        inputs = super().inputs(prepared, model)
        return {**inputs, "decoder_input_ids": torch.ones(len(inputs["input_ids"]), targets, dtype=torch.long)}

    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """How much is read and how much is learnt."""
        train = prepared.train
        longest = max(len(row["labels"]) for row in train.rows)
        ends = sum(row["labels"][-1] == prepared.tokenizer.eos_token_id for row in train.rows)
        return [
            ("tokens", f"{train.tokens:,} an epoch in the sources, {train.learnt:,} in the targets, which are learnt"),
            ("targets", f"{longest:,} tokens at most (seq2seq.max_target {prepared.config.seq2seq.max_target})"),
            ("end token", f"learnt in {ends:,} of {len(train):,} rows"),
        ]

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The first source and its target."""
        row, tokenizer = prepared.train.rows[0], prepared.tokenizer
        source = spelled(tokenizer, row["input_ids"], [False] * len(row["input_ids"]))
        return [*source, ("  → ", False), *spelled(tokenizer, row["labels"], [True] * len(row["labels"]))]


def target_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(sum of -log p over the target's tokens, their number); labels (batch, target length)."""
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, decoder_input_ids=shifted(model, labels)).logits[:, -labels.shape[1] :]
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def shifted(model: Any, labels: Tensor) -> Tensor:
    """What the decoder reads while it learns ``labels``: its start token, then all labels but the last."""
    config = model.config
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else text.bos_token_id
    first = torch.full_like(labels[:, :1], start)
    return torch.cat([first, labels[:, :-1]], 1).masked_fill(
        torch.cat([torch.zeros_like(first), labels[:, :-1]], 1) == IGNORED, text.pad_token_id or 0
    )


def source_of(example: Example, config: RunConfig) -> str:
    """The text that the encoder reads. An instruction stands with its input, without a chat around it."""
    asked_for = example.prompt if example.messages is None or example.prompt is None else _plain(example)
    return config.seq2seq.prefix + str(asked_for)


def _plain(example: Example) -> str:
    return str(next(turn["content"] for turn in example.messages or [] if turn["role"] == "user"))


def _encoded(examples: list[Example], tokenizer: Any, config: RunConfig) -> Tokenised:
    made = Tokenised()
    if not examples:
        return made
    sources = [source_of(example, config) for example in examples]
    rows, lengths = encoding.encode(tokenizer, sources, None, config.data.max_length)
    longest = config.seq2seq.max_target
    targets = tokenizer(text_target=[str(example.completion) for example in examples], verbose=False)["input_ids"]
    for example, row, target, length in zip(examples, rows, targets, lengths, strict=True):
        ids = list(target)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        if encoding.keep(made, example, {**row, "labels": ids[:longest]}, length, config):
            made.counts["target_cut"] += len(ids) > longest
    return made


def _written(model: Any, tokenizer: Any, ids: list[int], longest: int) -> str:
    training, device = model.training, next(model.parameters()).device
    model.eval()
    inputs = torch.tensor([ids], device=device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=longest, do_sample=False
        )
    model.train(training)
    return tokenizer.decode(output[0], skip_special_tokens=True)
