"""Learning from comparisons: what its tasks share, and the tasks dpo and kto."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.hf import heads
from veneer.train import distributed, preference_rows
from veneer.train import preference_tokens as tokens
from veneer.train import preference_trainers as trainers
from veneer.train.evaluate import pad_token
from veneer.train.policy import as_now, bare, checkpointing, measured
from veneer.train.preference_trainers import PairCollate, answer_logprobs
from veneer.train.sft import Sft, fits
from veneer.train.tasks import LOSS, Features, Material, Metric, Task, asked, asked_of
from veneer.train.trainer import Collate, Losses

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
VOCABULARY_PART = 32768
"""TRL 1.16's."""
RATE = 0.1
"""Comparisons are learnt at a tenth of the rate that answers are: beyond it the model drifts away from its language."""


class Preference(Sft):
    """What the four have in common. Questions and answers before and after are those of SFT."""

    formats: tuple[str, ...] = ("preference",)
    losses_known: tuple[str, ...] = ("auto",)
    metrics: tuple[Metric, ...] = (LOSS, Metric("rewards/accuracies", True), Metric("rewards/margins", True))
    rehearsal = Task.rehearsal

    def features(self, material: Material) -> Features:
        """Answers rendered and tokenised as SFT does it."""
        config, options = material.config, material.config.data
        settings = config.preference
        if settings.loss not in ("auto", *self.losses_known):
            raise ValueError(
                f"preference.loss is '{settings.loss}'; task {config.task} has {', '.join(self.losses_known)}."
            )
        renderer = tokens.renderer(material.tokenizer, material.rows, options.template, options.system)
        train = self.rows(material, material.rows, renderer)
        renderer.counts = type(renderer.counts)()
        held = self.rows(material, material.held, renderer)
        material.notices += notices(train, options.max_length)
        fits(train, material.base, config)
        config.data = options.model_copy(update={"template": renderer.template})
        if settings.reference == "auto":
            config.preference = settings.model_copy(
                update={"reference": "start" if config.adapter.get("start") else "base"}
            )
        return Features(train, held, PairCollate(pad_token(material.tokenizer)), None, renderer)

    def rows(self, material: Material, rows: list[Any], renderer: Any) -> tokens.Compared:
        """Pairs as ids."""
        options = material.config.data
        return tokens.pairs(rows, renderer, options.max_length, options.too_long)

    def learning_rate(self, adapter: Any, hidden: int | None) -> float:
        """A tenth of SFT's."""
        return float(f"{RATE * super().learning_rate(adapter, hidden):.1e}")

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """TRL's settings from ours."""
        raise NotImplementedError

    def trainer(self, prepared: Prepared, model: Any, arguments: dict[str, Any], optimiser: Any) -> Any:
        """TRL's, around the adapted model."""
        task = prepared.config.task
        reference = bare(model) if prepared.config.preference.reference == "base" else as_now(model)
        arguments = {**arguments, **self.settings(prepared), **checkpointing(prepared.config)}
        arguments.pop("label_names")
        rows, held = enough(prepared), prepared.held.rows
        return trainers.make(task, model, reference, arguments, rows, held, prepared.tokenizer, optimiser)

    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """The trainer's figures on the held-out rows."""
        found = measured(trainer)
        wanted = [*(metric.name for metric in self.metrics), "rewards/chosen", "rewards/rejected"]
        return {name: found[name] for name in wanted if name in found}

    def starting(self, prepared: Prepared) -> Any:
        """The chosen answers, as SFT has them."""
        return Collate(prepared.collate.pad)

    def inputs(self, prepared: Prepared, model: Any) -> dict[str, Any]:
        """Both answers of each pair of the largest batch."""
        rows = longest(prepared)
        shape = 2 * len(rows), len(rows[0]["prompt_ids"]) + answer_length(rows[0])
        return {key: torch.ones(*shape, dtype=torch.long) for key in ("input_ids", "attention_mask")}

    def step(self, prepared: Prepared, model: Any) -> tuple[Callable[[], Tensor], int]:
        """The rows with the longest answers."""
        return super().step(replace(prepared, feed=longest(prepared)), model)

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """For a probe step, which wants the cost and not the value: the answers' log-probabilities."""

        def total(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            found = answer_logprobs(model, batch)
            return -found.sum(), torch.tensor(len(found))

        return total

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The first chosen answer, and the one it is chosen over."""
        worse = prepared.tokenizer.decode(prepared.train.rows[0]["rejected_ids"])
        return [*super().sample(prepared), (f"\n  rather than\n{worse}", False)]

    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """How many pairs, how long, and what they are compared with."""
        train, options = prepared.train, prepared.config.data
        sides = {name: [len(row[f"{name}_ids"]) for row in train.rows] for name in ("chosen", "rejected")}
        middle = {name: sorted(lengths)[len(lengths) // 2] for name, lengths in sides.items()}
        longer = sum(a > b for a, b in zip(*sides.values(), strict=True))
        return [
            ("format", f"{options.format}, rendered by {options.template}, learnt: the answers"),
            ("pairs", f"{len(train):,}; chosen {middle['chosen']} tokens in the middle, rejected {middle['rejected']}"),
            ("", f"chosen is the longer one in {100 * longer / len(train):.0f} %"),
            ("tokens", f"{train.tokens:,} an epoch, {train.learnt:,} of them in answers"),
            ("end token", f"learnt in {train.counts['ends_learnt']:,} of {len(train):,} rows"),
            *self.compared_with(prepared),
        ]

    def compared_with(self, prepared: Prepared) -> list[tuple[str, str]]:
        """What the reference is."""
        what = {"base": "the bare base, which is this model with its adapter off"}
        what["start"] = f"the adapter as it starts ({prepared.config.adapter.get('start', 'fresh')})"
        return [("reference", f"{what[prepared.config.preference.reference]}; asked once for every row")]


class Referenced(Preference):
    """Losses of log-probabilities beside the reference's, which TRL takes a part of the vocabulary at a time."""

    def rehearsal(self, prepared: Prepared, model: Any) -> Tensor:
        """A buffer of the logits of one part, and some six intermediate values of it."""
        hidden = heads.before_head(model, **self.inputs(prepared, model)).flatten(0, -2)
        width = min(VOCABULARY_PART, len(model.get_output_embeddings().weight))
        with torch.no_grad():
            made = [hidden.new_empty(len(hidden), n, dtype=torch.float32) for n in (VOCABULARY_PART, *[width] * 6)]
        del made
        return (hidden * torch.zeros_like(hidden)).sum()


class Dpo(Referenced):
    """Direct preference optimisation (Rafailov et al. 2023), and the losses that TRL has beside it."""

    losses_known = DPO_LOSSES

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """Beta, the loss, and the reference's log-probabilities beforehand."""
        own = prepared.config.preference
        loss = "sigmoid" if own.loss == "auto" else own.loss
        shared = {"beta": own.beta, "precompute_ref_log_probs": True}
        return {**shared, "loss_type": [loss], "label_smoothing": own.label_smoothing}


class Kto(Referenced):
    """Answers that are good or bad by themselves (Ethayarajh et al. 2024)."""

    formats = ("kto",)
    losses_known = ("kto", "apo_zero_unpaired")
    metrics = (LOSS, Metric("rewards/margins", True))

    def features(self, material: Material) -> Features:
        """Refuses rows of one kind only."""
        if only := preference_rows.one_class(material.rows):
            raise ValueError(f"All {len(material.rows)} rows are {only}. {preference_rows.NEEDS_BOTH}")
        only = preference_rows.one_class(material.held)
        if only and material.config.eval.metric == "rewards/margins":
            raise ValueError(
                f"All {len(material.held)} held-out rows are {only}, so they have no margin; hold out more."
            )
        return super().features(material)

    def rows(self, material: Material, rows: list[Any], renderer: Any) -> tokens.Compared:
        """Labelled answers as ids."""
        config = material.config
        return tokens.labelled(rows, renderer, config.data.max_length, config.data.too_long, config.train.seed)

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """Beta, the loss and the weights of the two kinds."""
        own = prepared.config.preference
        good, bad = weights(own.balance, prepared.train.rows)
        shared = {"beta": own.beta, "precompute_ref_log_probs": True}
        loss = "kto" if own.loss == "auto" else own.loss
        return {**shared, "loss_type": loss, "desirable_weight": good, "undesirable_weight": bad}

    def inputs(self, prepared: Prepared, model: Any) -> dict[str, Any]:
        """One answer a row; the second pass, over other rows' answers, keeps nothing."""
        return {key: value[: len(value) // 2] for key, value in super().inputs(prepared, model).items()}

    def step(self, prepared: Prepared, model: Any) -> tuple[Callable[[], Tensor], int]:
        """As if the answers were pairs: two passes a row."""
        sides = {"chosen_ids": "completion_ids", "rejected_ids": "KL_completion_ids"}
        feed = [{**row, **{side: row[name] for side, name in sides.items()}} for row in prepared.feed]
        return super().step(replace(prepared, feed=feed), model)

    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Prompts, with the answer that is good or bad."""
        rows = [asked_of(prepared).rows[i] for i in asked(prepared)]
        shown = super().questions(prepared)
        return [
            (prompt, said if row["label"] else f"not: {said}") for (prompt, said), row in zip(shown, rows, strict=True)
        ]

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The first answer, and of which kind it is."""
        good = prepared.train.rows[0]["label"]
        return [*Sft.sample(self, prepared), (f"\n  which is {'good' if good else 'bad'}", False)]

    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """How many rows of each kind."""
        train, options = prepared.train, prepared.config.data
        good = sum(row["label"] for row in train.rows)
        weight = weights(prepared.config.preference.balance, train.rows)
        return [
            ("format", f"{options.format}, rendered by {options.template}, learnt: the answers"),
            ("labels", f"{good:,} good, {len(train) - good:,} bad, weighted {weight[0]:.3g} to {weight[1]:.3g}"),
            ("tokens", f"{train.tokens:,} an epoch, {train.learnt:,} of them in answers"),
            *self.compared_with(prepared),
        ]


def weights(balance: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """KTO's weights of good and bad rows; ``auto`` makes both kinds count alike, by raising the rarer one's."""
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    if balance == "auto":
        return max(1.0, bad / max(good, 1)), max(1.0, good / max(bad, 1))
    return float(balance[0]), float(balance[1])


def answer_length(row: dict[str, Any]) -> int:
    """Tokens of a row's longest answer."""
    return max(len(row[name]) for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row)


def longest(prepared: Prepared) -> list[dict[str, Any]]:
    """The largest batch."""
    ordered = sorted(prepared.feed, key=lambda row: -len(row["prompt_ids"]) - answer_length(row))
    return ordered[: prepared.config.train.batch_size]


def enough(prepared: Prepared) -> list[dict[str, Any]]:
    """The rows of a run; of rows that the steps will not reach, no reference is worked out."""
    train = prepared.config.train
    wanted = prepared.schedule.steps * train.batch_size * train.accumulate * distributed.replicas(prepared.config)
    rows = prepared.feed
    if wanted >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(train.seed))[:wanted]
    return [rows[i] for i in order.tolist()]


def notices(train: tokens.Compared, limit: int) -> list[str]:
    """What happened to the rows."""
    total = len(train.lengths)
    texts = {
        "dropped_unlearnt": f"of {total} prompts alone fill data.max_length {limit}; their rows were dropped.",
        "dropped_long": f"of {total} rows are longer than data.max_length {limit} and were dropped.",
        "truncated": f"of {total} rows are longer than data.max_length {limit} and were cut.",
        "dropped_alike": f"of {total} pairs are alike within data.max_length {limit} and were dropped.",
        "split_at_boundary": "answers would share a token with their prompt; it was split there.",
    }
    found = [f"{train.counts[key]} {text}" for key, text in texts.items() if train.counts[key]]
    if (unended := len(train) - train.counts["ends_learnt"]) > len(train) // 2:
        found.append(f"{unended} of {len(train)} answers have no end token: the model may not know when to stop.")
    return found
