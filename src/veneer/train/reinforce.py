"""Learning from rewards: the tasks grpo and rloo, by TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.train import distributed, rewards
from veneer.train import preference_tokens as tokens
from veneer.train.evaluate import answer, end_tokens, pad_token
from veneer.train.policy import Policy, Reference, as_now, bare, checkpointing, measured, trl
from veneer.train.preference import notices
from veneer.train.sft import Sft, fits
from veneer.train.tasks import Features, Material, Metric, Task, asked, asked_of, largest
from veneer.train.trainer import Collate

if TYPE_CHECKING:
    from veneer.train.prepare import Prepared

RATE = 0.1
"""As in ``preference``: a tenth of the rate at which answers are learnt."""


class Sampled(Policy):
    """Stands before GRPO's and RLOO's trainer: the reference is the model itself.

    Without this the trainer would load a second model for it, so it is made with ``beta`` 0 and told afterwards.
    """

    def __init__(self, model: Any, reference: Reference, task: str, *, args: Any, **options: Any):
        beta, args.beta = args.beta, 0.0
        super().__init__(model, reference, task, args=args, **options)
        args.beta = self.beta = beta
        self.ref_model = ITSELF if beta else None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        parent = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        if model is not ITSELF:
            return parent(model, *args, **kwargs)
        with torch.no_grad(), self.reference():
            return parent(self.model, *args, **kwargs)  # type: ignore[attr-defined]


ITSELF = object()
"""Stands where TRL keeps its reference model."""


class Grpo(Sft):
    """Group relative policy optimisation (Shao et al. 2024), and the losses that TRL has beside it."""

    formats: tuple[str, ...] = ("prompts", "messages", "sharegpt", "alpaca")
    metrics = (Metric("reward", True),)
    trl_name = "GRPO"
    losses_known: tuple[str, ...] = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")
    rehearsal = Task.rehearsal

    def features(self, material: Material) -> Features:
        """Prompts with their columns; refuses a run without a reward."""
        config, options, rl = material.config, material.config.data, material.config.rl
        if rl.loss not in ("auto", *self.losses_known):
            raise ValueError(
                f"rl.loss is '{rl.loss}'; task {config.task} has {', '.join(self.losses_known) or 'one only'}."
            )
        if not rl.rewards:
            raise ValueError(
                f"task: {config.task} needs rl.rewards, say  rl: {{rewards: [{{use: exact, options: "
                f"{{column: answer}}}}]}}; built in are {', '.join([*rewards.BUILT_IN, *rewards.MADE])}."
            )
        for one in rl.rewards:
            rewards.check(one.use, one.options)
            if one.use in rewards.MADE and "url" not in one.options:
                material.notices.append(
                    f"The reward '{one.use}' loads a model of its own, beside the memory given here."
                )
        if taken := {"prompts", "completions"} & {name for example in material.rows for name in example.extra}:
            raise ValueError(
                f"The data have a column '{min(taken)}', which rewards get from the run; name it otherwise."
            )
        _groups(material)
        rows = [_asking(example) for example in material.rows]
        renderer = tokens.renderer(material.tokenizer, rows, options.template, options.system)
        train = tokens.prompts(rows, renderer, options.max_length)
        train.times, train.room = rl.generations, rl.max_new_tokens
        renderer.counts = type(renderer.counts)()
        held = tokens.prompts([_asking(example) for example in material.held], renderer, options.max_length)
        material.notices += [line for line in notices(train, options.max_length) if "end token" not in line]
        fits(train, material.base, config)
        config.data = options.model_copy(update={"template": renderer.template})
        if rl.reference == "auto":
            rl.reference = "start" if config.adapter.get("start") else "base"
        epoch = len(train) * rl.generations
        return Features(train, held, Collate(pad_token(material.tokenizer)), None, renderer, epoch)

    def learning_rate(self, adapter: Any, hidden: int | None) -> float:
        """A tenth of SFT's."""
        return float(f"{RATE * super().learning_rate(adapter, hidden):.1e}")

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """TRL's settings from ours."""
        rl = prepared.config.rl
        shared = {
            "num_generations": rl.generations, "max_completion_length": rl.max_new_tokens, "top_p": rl.top_p,
            "temperature": rl.temperature, "beta": rl.beta, "num_iterations": rl.iterations,
            "reward_weights": [one.weight for one in rl.rewards], "mask_truncated_completions": not rl.keep_cut,
        }  # fmt: skip
        return {**shared, "loss_type": "dapo" if rl.loss == "auto" else rl.loss}

    def trainer(self, prepared: Prepared, model: Any, arguments: dict[str, Any], optimiser: Any) -> Any:
        """TRL's, around the adapted model."""
        config, name = prepared.config, self.trl_name
        reference = bare(model) if config.rl.reference == "base" else as_now(model)
        arguments = {**arguments, **self.settings(prepared), **checkpointing(config)}
        arguments["per_device_eval_batch_size"] = config.rl.generations
        arguments.pop("label_names")
        cls = type(f"Adapted{name}Trainer", (Sampled, trl(f"{name}Trainer", config.task)), {})
        rows = [*prepared.feed, *prepared.held.rows]
        columns = [row["columns"] for row in rows]
        functions = [rewards.Checked(one.use, rewards.find(one.use, one.options), columns) for one in config.rl.rewards]
        return cls(
            model,
            reference,
            config.task,
            args=trl(f"{name}Config", config.task)(**arguments),
            reward_funcs=functions,
            train_dataset=_table(rows, 0, len(prepared.feed)),
            eval_dataset=_table(rows, len(prepared.feed), len(rows)) if len(prepared.held) else None,
            processing_class=prepared.tokenizer,
            optimizers=(optimiser, None),
        )

    def measure(self, prepared: Prepared, model: Any, trainer: Any) -> dict[str, float]:
        """The mean reward of sampled answers to the held-out prompts."""
        torch.manual_seed(prepared.config.train.seed)  # the same luck each time
        found = measured(trainer)
        return {
            name: value
            for name, value in found.items()
            if name == "reward" or name.endswith("/mean") and "rewards/" in name
        }

    # ---- before and after -------------------------------------------------------------------------------------------
    def questions(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Prompts, and what the data say of their answers."""
        source = asked_of(prepared)
        found = []
        for i in asked(prepared):
            columns = source.rows[i]["columns"]
            right = columns.get("answer", columns.get("completion", ""))
            found.append((rewards.text(source.rows[i]["prompt"]), str(right)))
        return found

    def answers(self, prepared: Prepared, model: Any) -> list[str]:
        """What the model writes, by the likeliest token each time."""
        source, tokenizer = asked_of(prepared), prepared.tokenizer
        most = min(prepared.config.eval.max_new_tokens, prepared.config.rl.max_new_tokens)
        ends = end_tokens(model, tokenizer)
        texts = [tokenizer.decode(source.rows[i]["input_ids"]) for i in asked(prepared)]
        return [answer(model, tokenizer, text, max_new_tokens=most, ends=ends) for text in texts]

    # ---- the plan ---------------------------------------------------------------------------------------------------
    def inputs(self, prepared: Prepared, model: Any) -> dict[str, Any]:
        """A batch of the longest prompt with the longest answers."""
        _, length = largest(prepared)
        shape = prepared.config.train.batch_size, length + prepared.config.rl.max_new_tokens
        return {key: torch.ones(*shape, dtype=torch.long) for key in ("input_ids", "attention_mask")}

    def step(self, prepared: Prepared, model: Any) -> tuple[Callable[[], Tensor], int]:
        """Answers of full length to the longest prompts, written and learnt from."""
        rl, size = prepared.config.rl, prepared.config.train.batch_size
        rows = sorted(prepared.feed, key=lambda row: -len(row["input_ids"]))
        asked = prepared.collate([rows[i // rl.generations % len(rows)] for i in range(size)])
        device, pad = next(model.parameters()).device, pad_token(prepared.tokenizer)
        inputs = {name: asked[name].to(device) for name in ("input_ids", "attention_mask")}
        length = {"min_new_tokens": rl.max_new_tokens, "max_new_tokens": rl.max_new_tokens}

        def loss() -> Tensor:
            with torch.no_grad():
                ids = model.generate(**inputs, **length, do_sample=True, pad_token_id=pad)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            return -logits.float().log_softmax(-1)[..., 0].mean()

        return loss, int(inputs["input_ids"].numel()) + size * rl.max_new_tokens

    def sample(self, prepared: Prepared) -> list[tuple[str, bool]]:
        """The first prompt; what follows it is the model's own."""
        return [*super().sample(prepared), ("...", True)]

    def facts(self, prepared: Prepared) -> list[tuple[str, str]]:
        """Prompts, rewards, and how answers are drawn."""
        config, rl, train = prepared.config, prepared.config.rl, prepared.train
        batch = config.train.batch_size * config.train.accumulate * distributed.replicas(config)
        named = ", ".join(f"{one.use}" + (f" x {one.weight:g}" if one.weight != 1 else "") for one in rl.rewards)
        columns = ", ".join(train.rows[0]["columns"]) or "none"
        what = {"base": "the bare base, which is this model with its adapter off", "start": "the adapter as it starts"}
        return [
            ("format", f"{config.data.format}, rendered by {config.data.template}; columns for rewards: {columns}"),
            ("rewards", named),
            (
                "answers",
                f"{rl.generations} a prompt, of {rl.max_new_tokens} tokens at most, temperature {rl.temperature:g}",
            ),
            ("a step", f"{batch} answers to {batch // rl.generations} prompt" + "s" * (batch > rl.generations)),
            ("reference", f"{what[rl.reference]}, weighted {rl.beta:g}" if rl.beta else "none (rl.beta is 0)"),
        ]


class Rloo(Grpo):
    """REINFORCE with the other answers as the baseline (Ahmadian et al. 2024)."""

    trl_name = "RLOO"
    losses_known = ()

    def settings(self, prepared: Prepared) -> dict[str, Any]:
        """RLOO has one loss."""
        return {name: value for name, value in super().settings(prepared).items() if name != "loss_type"}


def _asking(example: Any) -> Any:
    """The example as a prompt: of rows with an answer, what comes before it; the answer is the column ``answer``."""
    if "prompt" in example.extra:
        return example
    turns = list(example.messages)
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    right = str(turns[last]["content"])
    asked = turns[:last]
    single = len(asked) == 1 and asked[0]["role"] == "user"
    prompt = asked[0]["content"] if single else asked
    return type(example)(example.where, prompt=example.question, extra={"prompt": prompt, "answer": right})


def _groups(material: Material) -> None:
    """See to it that a step holds whole groups of answers.

    Raises:
        ValueError: it does not, and ``train.accumulate`` is set.
    """
    train, generations = material.config.train, material.config.rl.generations
    world = distributed.replicas(material.config)
    if not (train.batch_size * train.accumulate * world) % generations:
        return
    fitting = next(n for n in range(1, generations + 1) if not (train.batch_size * n * world) % generations)
    if "accumulate" in train.model_fields_set:
        raise ValueError(
            f"A step of {train.batch_size} x {train.accumulate} answers (train.batch_size x train.accumulate) does not "
            f"hold whole groups of rl.generations {generations}; set train.accumulate: {fitting}."
        )
    material.notices.append(
        f"train.accumulate is {fitting}, so that a step holds whole groups of {generations} answers."
    )
    train.accumulate = fitting


def _table(rows: list[dict[str, Any]], start: int, stop: int) -> Any:
    """The rows as TRL takes them: the prompt, and the number under which rewards find the rest."""
    from datasets import Dataset, disable_progress_bars  # slow to import, and TRL's own

    disable_progress_bars()
    return Dataset.from_list([{"prompt": rows[i]["prompt"], rewards.NUMBER_OF: i} for i in range(start, stop)])
