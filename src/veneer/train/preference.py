"""Learning from comparisons: the tasks dpo, kto, orpo and reward."""

from __future__ import annotations

import os
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from veneer.train import preference_rows
from veneer.train import preference_tokens as tokens
from veneer.train import preference_trainers as trainers
from veneer.train.evaluate import pad_token
from veneer.train.policy import as_now, bare, checkpointing, measured
from veneer.train.preference_trainers import OrpoTrainer, PairCollate, answer_logprobs, orpo
from veneer.train.reward_model import rewards, scored
from veneer.train.sft import Sft, fits
from veneer.train.tasks import LOSS, Features, Material, Metric, asked, asked_of, batch_size, largest
from veneer.train.trainer import Collate, Losses

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared

DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
RATE = 0.1
"""Comparisons are learnt at a tenth of the rate that answers are: beyond it the model drifts away from its language."""


class Preference(Sft):
    """What the four have in common. Questions and answers before and after are those of SFT."""

    formats: tuple[str, ...] = ("preference",)
    losses_known: tuple[str, ...] = ("auto",)
    metrics: tuple[Metric, ...] = (LOSS, Metric("rewards/accuracies", True), Metric("rewards/margins", True))

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
        rows, length = largest(prepared)
        return {key: torch.ones(2 * rows, length, dtype=torch.long) for key in ("input_ids", "attention_mask")}

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """For a probe step, which wants the cost and not the value: the answers' log-probabilities."""

        def total(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            found = answer_logprobs(model, batch)
            return -found.sum(), torch.tensor(len(found))

        return total

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


class Dpo(Preference):
    """Direct preference optimisation (Rafailov et al. 2023), and the losses that TRL has beside it."""

    losses_known = DPO_LOSSES

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """Beta, the loss, and the reference's log-probabilities beforehand."""
        own = prepared.config.preference
        loss = "sigmoid" if own.loss == "auto" else own.loss
        shared = {"beta": own.beta, "precompute_ref_log_probs": True}
        return {**shared, "loss_type": [loss], "label_smoothing": own.label_smoothing}


class Kto(Preference):
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
        """One answer a row; the second pass, over other prompts' answers, keeps nothing."""
        rows, length = largest(prepared)
        return {key: torch.ones(rows, length, dtype=torch.long) for key in ("input_ids", "attention_mask")}

    def step(self, prepared: Prepared, model: Any) -> Any:
        """As if the answers were pairs: two passes a row."""
        feed = [
            {**row, "chosen_ids": row["completion_ids"], "rejected_ids": row["KL_completion_ids"]}
            for row in prepared.feed
        ]
        prepared = type(prepared)(**{**vars(prepared), "feed": feed})
        return super().step(prepared, model)

    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Prompts, with the answer that is good or bad."""
        rows = [asked_of(prepared).rows[i] for i in asked(prepared)]
        shown = super().questions(prepared)
        return [
            (prompt, said if row["label"] else f"not: {said}") for (prompt, said), row in zip(shown, rows, strict=True)
        ]

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


class Reward(Preference):
    """A model that gives a number to an answer (Bradley and Terry): more to the chosen one than to the rejected one."""

    adapter_type = "SEQ_CLS"
    auto = "AutoModelForSequenceClassification"
    metrics = (LOSS, Metric("accuracy", True), Metric("margin", True))
    prompts = "pairs"

    def features(self, material: Material) -> Features:
        """With one number at the end of the base."""
        self.settle(material.config, material.base, material.tokenizer)
        return super().features(material)

    def settle(self, config: Any, base: Any, tokenizer: Any) -> Any:
        """One number, read at the last token before the padding."""
        base.num_labels, base.pad_token_id = 1, pad_token(tokenizer)
        return base

    def respond(self, config: Any, tokenizer: Any, model: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """``reward``, the number of a row's ``answer`` or ``completion``, or of the last turn of its ``messages``."""
        found = scored(model, tokenizer, [_said(row) for row in rows], config.data)
        return [{"answer": row.get("answer", ""), "reward": value} for row, value in zip(rows, found, strict=True)]

    def learning_rate(self, adapter: Any, hidden: int | None) -> float:
        """SFT's: there is a head to learn, and no language to lose."""
        return Sft.learning_rate(self, adapter, hidden)

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """Whether rewards are kept around zero."""
        return {"center_rewards_coefficient": prepared.config.preference.centre}

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """-log sigmoid(reward of the chosen - reward of the rejected)."""

        def total(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            chosen, rejected = rewards(model, batch).chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected).sum(), torch.tensor(len(batch["labels"]))

        return total

    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Pairs: which one is to have the higher reward."""
        source = asked_of(prepared)
        decode = partial(prepared.tokenizer.decode, skip_special_tokens=True)
        found = []
        for i in asked(prepared):
            row = source.rows[i]
            found.append((source.sources[i].question, f"{decode(row['chosen_ids'])}  >  {decode(row['rejected_ids'])}"))
        return found

    @torch.no_grad()
    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """Both rewards of each pair."""
        source, device, training = asked_of(prepared), next(model.parameters()).device, model.training
        model.eval()
        found = []
        for i in asked(prepared):
            batch = {k: v.to(device) for k, v in prepared.collate([source.rows[i]]).items()}
            chosen, rejected = rewards(model, batch).tolist()
            found.append(f"{chosen:.2f}  {'>' if chosen > rejected else '<'}  {rejected:.2f}")
        model.train(training)
        return found

    def compared_with(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Nothing: rewards stand for themselves."""
        return []


def _said(row: dict[str, Any]) -> tuple[Any, Any]:
    """(prompt, answer) of a row."""
    if isinstance(row.get("messages"), list):
        return row["messages"][:-1], row["messages"][-1:]
    answer = row.get("answer", row.get("completion"))
    if "prompt" not in row or answer is None:
        raise ValueError("A reward model reads rows with 'prompt' and 'answer', or with 'messages' that end with it.")
    return row["prompt"], answer


class Orpo(Preference):
    """SFT on the chosen answer with a term against the rejected one (Hong et al. 2024); there is no reference."""

    losses_known = ("orpo",)

    def losses(self, prepared: Prepared, model: Any) -> Losses:
        """See ``preference_trainers.orpo``."""
        return partial(self._losses, prepared.config.preference.beta, defaultdict(list))

    def _losses(
        self, weight: float, figures: defaultdict[str, list[float]], model: Any, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        loss, found = orpo(answer_logprobs(model, batch), weight)
        for name, value in found.items():
            figures[name].append(value.item())
        return loss, torch.tensor(len(batch["labels"]))

    def trainer(self, prepared: Prepared, model: Any, arguments: dict[str, Any], optimiser: Any) -> Any:
        """Ours, with this loss."""
        figures: defaultdict[str, list[float]] = defaultdict(list)
        made = OrpoTrainer(
            model,
            TrainingArguments(**arguments),
            prepared.collate,
            prepared.feed,
            prepared.held.rows if len(prepared.held) else None,
            optimizers=(optimiser, None),
            losses=partial(self._losses, prepared.config.preference.beta, figures),
            measure=partial(self.measure, prepared, model),
        )
        made.figures = figures
        return made

    @torch.no_grad()
    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """The loss and the figures over all held-out pairs."""
        rows, training = prepared.held.rows, model.training
        size, device = batch_size(prepared), next(model.parameters()).device
        model.eval()
        parts = []
        for start in range(0, len(rows), size):
            batch = {k: v.to(device) for k, v in prepared.collate(rows[start : start + size]).items()}
            parts.append(answer_logprobs(model, batch).chunk(2))
        model.train(training)
        both = torch.cat([torch.cat(side) for side in zip(*parts, strict=True)])
        loss, figures = orpo(both, prepared.config.preference.beta)
        return {"loss": loss.item() / len(rows), **{name: value.item() for name, value in figures.items()}}

    def compared_with(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Nothing: that is the point of it."""
        return [("reference", "none; the answers' odds are compared with each other")]


def weights(balance: Any, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """KTO's weights of good and bad rows; ``auto`` makes both kinds count alike, by raising the rarer one's."""
    good = sum(row["label"] for row in rows)
    bad = len(rows) - good
    if balance == "auto":
        return max(1.0, bad / max(good, 1)), max(1.0, good / max(bad, 1))
    return float(balance[0]), float(balance[1])


def enough(prepared: Prepared) -> list[dict[str, Any]]:
    """The rows of a run; of rows that the steps will not reach, no reference is worked out."""
    train = prepared.config.train
    wanted = prepared.schedule.steps * train.batch_size * train.accumulate * int(os.environ.get("WORLD_SIZE", 1))
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
