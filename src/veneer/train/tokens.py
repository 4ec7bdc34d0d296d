"""From examples to token ids with a loss mask: what the model reads, and which tokens it learns.

A conversation is rendered by the tokenizer's own chat template, turn by turn: the text that an assistant turn adds to
the rendering of everything before it (with the generation prompt) is what the model will have to write, and so what it
learns. No template needs editing. Token boundaries at the start of each learnt span are those of generation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from veneer.train.data import Example
from veneer.train.rows import Row

IGNORED = -100
Piece = tuple[str, bool]
"""A stretch of text, and whether it is learnt."""


@dataclass
class Tokenised:
    """Rows ready for the trainer, with what the plan says about them. Labels stand by token, or one for a row."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    sources: list[Example] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """truncated, dropped_long, dropped_unlearnt, split_at_boundary, last_turn_only, ends_learnt."""

    @property
    def tokens(self) -> int:
        return sum(len(ids) for row in self.rows for name, ids in row.items() if name.endswith("input_ids"))

    @property
    def learnt(self) -> int:
        labels = (row.get("labels") for row in self.rows)
        return sum(sum(label != IGNORED for label in one) if isinstance(one, list) else 1 for one in labels)

    def __len__(self) -> int:
        return len(self.rows)


class Renderer:
    """Turns examples into pieces of text, and pieces into ids, for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        template: ``chat`` (the tokenizer's template), ``alpaca``, ``none``, or ``auto``: chat where there is a template
            and the data are instructions, conversations, or prompts whose completions do not ``continue`` their text.
        loss_on: ``assistant`` (all assistant turns), ``completion`` (the last one), ``all``, or ``auto``.
        format: the data's format, which decides what ``auto`` means.
        system: a system message for conversations without one.
        continues: prompt and completion are one text, cut in two.

    Raises:
        ValueError: conversations without a chat template to render them.
    """

    def __init__(
        self,
        tokenizer: Any,
        format: str,
        template: str = "auto",
        loss_on: str = "auto",
        system: str | None = None,
        continues: bool = False,
    ):
        has_template = bool(getattr(tokenizer, "chat_template", None))
        conversations = format in ("messages", "sharegpt")
        if template == "auto":
            instructs = format == "alpaca" or (format == "prompt" and not continues)
            template = "chat" if conversations or (instructs and has_template) else "none"
            if format == "alpaca" and template == "none":
                template = "alpaca"
        if template == "chat" and not has_template:
            raise ValueError(
                f"The tokenizer of '{tokenizer.name_or_path}' has no chat template, and the data ({format}) need one; "
                "set model.chat_template to a Jinja file" + ("." if conversations else ", or data.template: none.")
            )
        if conversations and template != "chat":
            raise ValueError(f"data.template '{template}' cannot render conversations ({format}); use chat.")
        if loss_on == "auto":
            loss_on = "all" if format == "text" else "assistant" if conversations else "completion"
        if format == "text" and loss_on != "all":
            raise ValueError(f"data.loss_on '{loss_on}' has no meaning for plain text; use all.")
        self.tokenizer, self.template, self.loss_on, self.system = tokenizer, template, loss_on, system
        self.counts: Counter[str] = Counter()
        opening = tokenizer("a", add_special_tokens=True)["input_ids"]
        self.bos = tokenizer.bos_token_id if opening and opening[0] == tokenizer.bos_token_id else None
        self.specials = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())

    # ---- text -----------------------------------------------------------------------------------------------------
    def pieces(self, example: Example) -> list[Piece]:
        """The example's text, cut where learning starts and stops."""
        whole = self.loss_on == "all"
        if example.text is not None:
            return [(example.text, True)]
        if self.template == "chat":
            return self._conversation(example, whole)
        assert example.prompt is not None and example.completion is not None
        return [(example.prompt, whole), (example.completion, True)]

    def prompt(self, example: Example) -> str:
        """What the model is given at inference: everything before the last learnt turn."""
        if example.text is not None:
            return example.text[: max(1, len(example.text) // 4)]
        if self.template != "chat":
            return str(example.prompt)
        messages = self._with_system(example.messages or [])
        last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
        return self.chat(messages[:last], example.tools)

    def chat(self, messages: list[Row], tools: Any = None, generate: bool = True) -> str:
        """The template's rendering of ``messages``.

        Raises:
            ValueError: the template refuses them, with its own reason.
        """
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # templates raise whatever they like; jinja wraps it
            raise ValueError(f"the chat template refuses this conversation: {error}") from error

    def _with_system(self, messages: list[Row]) -> list[Row]:
        if self.system is None or (messages[:1] and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def _conversation(self, example: Example, whole: bool) -> list[Piece]:
        messages = self._with_system(example.messages or [])
        last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
        text = self.chat(messages[: last + 1], example.tools, generate=False)
        if whole:
            return [(text, True)]
        turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        spans = [
            self._span(messages, i, example.tools, text) for i in (turns if self.loss_on == "assistant" else turns[-1:])
        ]
        if (
            None in spans
        ):  # the template rewrites earlier turns (say, drops their reasoning): only the last can be learnt
            self.counts["last_turn_only"] += 1
            spans = spans[-1:]
        pieces, at = [], 0
        for span in spans:
            if span is None:
                raise ValueError(
                    "the chat template renders the last assistant turn differently with and without its prompt"
                )
            pieces += [(text[at : span[0]], False), (text[span[0] : span[1]], True)]
            at = span[1]
        return [(piece, learnt) for piece, learnt in [*pieces, (text[at:], False)] if piece]

    def _span(self, messages: list[Row], i: int, tools: Any, text: str) -> tuple[int, int] | None:
        """Where assistant turn ``i`` stands: from the end of its generation prompt to its end-of-turn mark."""
        before = self.chat(messages[:i], tools) if i else ""
        through = self.chat(messages[: i + 1], tools, generate=False)
        if not text.startswith(through):
            return None
        start = next(
            (k for k, (a, b) in enumerate(zip(before, through, strict=False)) if a != b), min(len(before), len(through))
        )
        bare = len(self.chat(messages[:i], tools, generate=False)) if i else 0
        if start < bare:
            return None
        return start, len(through.rstrip()) if through.rstrip()[start:] else len(through)

    # ---- ids ------------------------------------------------------------------------------------------------------
    def encode_all(self, examples: Iterable[Example]) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of each example, as ``encode`` has them.

        Raises:
            ValueError: a conversation that the template refuses, by file and row.
        """
        pieces = []
        for example in examples:
            try:
                pieces.append(self.pieces(example))
            except ValueError as error:
                raise ValueError(f"{example.where}: {error}.") from None
        return self.encode(pieces)

    def encode(self, all_pieces: list[list[Piece]]) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) of each example, untruncated, with BOS and end-of-text where the text lacks them."""
        texts: list[str] = []
        cuts: list[tuple[int, list[int]]] = []
        for pieces in all_pieces:
            text, ends = "", []
            for piece, _ in pieces:
                text += piece
                ends.append(len(text))
            cuts.append((len(texts), ends))
            texts += [text[:end] for end in ends]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        rows = []
        for (first, ends), pieces in zip(cuts, all_pieces, strict=True):
            prefixes = ids[first : first + len(ends)]
            rows.append(self._labelled(pieces, prefixes))
        return rows

    def _labelled(self, pieces: list[Piece], prefixes: list[list[int]]) -> tuple[list[int], list[int]]:
        whole = prefixes[-1]
        if all(whole[: len(prefix)] == prefix for prefix in prefixes):
            parts = [whole[a:b] for a, b in zip([0, *map(len, prefixes)], map(len, prefixes), strict=False)]
        else:  # a token would straddle the border, which it cannot when the model generates from there
            self.counts["split_at_boundary"] += 1
            parts = self.tokenizer([piece for piece, _ in pieces], add_special_tokens=False)["input_ids"]
        ids, labels = [], []
        for part, (_, learnt) in zip(parts, pieces, strict=True):
            ids += part
            labels += part if learnt else [IGNORED] * len(part)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids, labels = [self.bos, *ids], [IGNORED, *labels]
        eos = self.tokenizer.eos_token_id
        marked = labels and labels[-1] in self.specials
        if eos is not None and pieces[-1][1] and not marked:
            ids, labels = [*ids, eos], [*labels, eos]
        return ids, labels

    def tokenise(self, examples: Iterable[Example], max_length: int, too_long: str = "truncate") -> Tokenised:
        """Examples as rows of ``input_ids`` and ``labels``.

        A row without a learnt token (after truncation) is dropped and counted. The first label of a row is never
        learnt: nothing comes before it to predict it from.

        Raises:
            ValueError: a conversation that the template refuses, by file and row; or no row is left to learn from.
        """
        result, examples = Tokenised(counts=self.counts), list(examples)
        for example, (ids, labels) in zip(examples, self.encode_all(examples), strict=True):
            result.lengths.append(len(ids))
            if len(ids) > max_length:
                result.counts["truncated" if too_long == "truncate" else "dropped_long"] += 1
                if too_long == "drop":
                    continue
            row = {"input_ids": ids[:max_length], "labels": [IGNORED, *labels[1:max_length]]}
            if all(label == IGNORED for label in row["labels"]):
                result.counts["dropped_unlearnt"] += 1
                continue
            result.counts["ends_learnt"] += any(label in self.specials for label in row["labels"])
            result.rows.append(row)
            result.sources.append(example)
        if examples and not result.rows:
            raise ValueError(
                f"None of the {len(examples)} rows has a token to learn: with data.max_length {max_length} the prompts "
                f"alone fill the rows (the longest row has {max(result.lengths)} tokens). Raise data.max_length."
            )
        return result
