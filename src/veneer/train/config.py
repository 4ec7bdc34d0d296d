"""A run's settings: typed sections, unknown keys forbidden, all errors at once with their place in the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from veneer.train import document
from veneer.train.document import Document, Loc
from veneer.train.names import ELSEWHERE, SHORT

Files = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
TaskName = Annotated[
    Literal[
        "sft", "seq2seq", "sequence-classification", "token-classification", "embeddings",
        "dpo", "kto", "orpo", "reward", "grpo", "rloo",
    ],
    BeforeValidator(lambda value: value.lower().replace("_", "-") if isinstance(value, str) else value),
]  # fmt: skip
Amount = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
NAMES_ADAPTER = {"method", "path", "peft_type", "start"}


class Section(BaseModel):
    """A block of settings. A bare value in its place means the field named by ``shorthand``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return {cls.shorthand: value} if cls.shorthand and isinstance(value, str | list) else value


class Model(Section):
    """The base model and how it is loaded."""

    shorthand: ClassVar[str | None] = "path"
    path: str = Field(description="A local folder or a hub id.")
    revision: str | None = None
    tokenizer: str | None = Field(None, description="Another folder or id for the tokenizer.")
    chat_template: str | None = Field(None, description="A Jinja file, or chatml or zephyr.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    device: str = "auto"
    quantize: Literal["none", "nf4", "bnb-nf4", "fp4", "int8"] = Field(
        "none", description="nf4: built in, by bitsandbytes on CUDA where it is installed; the others: by bitsandbytes."
    )
    double_quant: bool = Field(True, description="Quantise the scales of nf4 and fp4 too.")
    trust_remote_code: bool = False


class Data(Section):
    """The examples, what they look like, and which of their tokens are learnt."""

    shorthand: ClassVar[str | None] = "train"
    train: Files = Field(min_length=1, description="Files or globs; `file#500` takes the first 500 rows.")
    eval: Files = Field(default_factory=list, description="Held-out files; without them `holdout` applies.")
    holdout: Auto | Amount = Field("auto", description="Rows (>= 1) or share (< 1) held out of `train`.")
    format: Literal[
        "auto", "alpaca", "prompt", "messages", "sharegpt", "text", "labels", "tags", "pairs",
        "preference", "kto", "prompts",
    ] = "auto"  # fmt: skip
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our column name -> yours, e.g. prompt: question."
    )
    template: Literal["auto", "chat", "alpaca", "none"] = "auto"
    system: str | None = Field(None, description="A system message for rows that have none.")
    loss_on: Literal["auto", "completion", "assistant", "all"] = "auto"
    max_length: int = Field(1024, ge=2)
    too_long: Literal["truncate", "drop"] = "truncate"
    bad_rows: Literal["error", "skip"] = "error"
    packing: bool = Field(False, description="Several rows in one, none of which sees another.")


class Train(Section):
    """Length, batches, optimiser."""

    epochs: float = Field(3.0, gt=0)
    steps: int | None = Field(None, ge=1, description="Stop after this many steps, whatever `epochs` says.")
    batch_size: int = Field(4, ge=1)
    accumulate: int = Field(1, ge=1, description="Batches summed into one step.")
    learning_rate: Auto | Rate = "auto"
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "linear"
    warmup: float = Field(0.03, ge=0, description="Share of the steps (< 1) or a number of steps.")
    optimizer: str = Field(
        "adamw_torch", description="Any of the Trainer's, or adamw_flat, loraplus, lorafa, riemannian, lorapro."
    )
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0)
    gradient_checkpointing: bool = False
    chunked_loss: bool = Field(True, description="Never hold the logits of a whole batch; the result is the same.")
    save_every: Auto | Count = Field("auto", description="Steps between checkpoints; with an eval set, its rhythm.")
    keep: int = Field(2, ge=1, description="Checkpoints kept, besides the best one.")
    threads: Auto | Count = "auto"
    workers: int = Field(0, ge=0)
    seed: int = 42


class Eval(Section):
    """Held-out loss, best checkpoint, early stop, and the prompts answered before and after."""

    every: Auto | Count = Field("auto", description="Steps between evaluations; auto gives about five in a run.")
    batch_size: int | None = Field(None, ge=1)
    metric: str = Field("auto", description="What decides which checkpoint is best; auto: the task's first one.")
    best: bool = Field(True, description="End with the checkpoint that scores best on the held-out rows.")
    patience: int | None = Field(None, ge=1, description="Stop after this many evaluations without improvement.")
    prompts: int = Field(3, ge=0, description="Held-out prompts answered before and after.")
    max_new_tokens: int = Field(64, ge=1)


class Seq2Seq(Section):
    """For ``task: seq2seq``."""

    prefix: str = Field("", description="Put before every source text, such as 'summarize: '.")
    max_target: int = Field(256, ge=1, description="Tokens of a target at most.")


class Classes(Section):
    """For ``task: sequence-classification`` and ``token-classification``."""

    shorthand: ClassVar[str | None] = "names"
    names: list[str] = Field(default_factory=list, description="The classes, in order; default: those of the data.")
    balanced: bool = Field(False, description="Weight rows so that rare classes count as much as common ones.")


class Embeddings(Section):
    """For ``task: embeddings``."""

    pooling: Literal["mean", "first", "last"] = Field("mean", description="Which tokens make up a text's vector.")
    temperature: float = Field(0.05, gt=0, description="Cosine similarities are divided by it.")


Reference = Literal["auto", "base", "start"]


class Preference(Section):
    """For ``task: dpo``, ``kto``, ``orpo`` and ``reward``."""

    beta: float = Field(0.1, gt=0, description="How near to the reference the model stays; ORPO's weight of its odds.")
    loss: str = Field("auto", description="dpo: sigmoid, ipo, hinge, apo_zero, ...; kto: kto, apo_zero_unpaired.")
    reference: Reference = Field(
        "auto",
        description="base: the model with its adapter off; start: as it starts; auto: start after adapter.start.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of the pairs that may be the wrong way round.")
    balance: Auto | tuple[Amount, Amount] = Field("auto", description="KTO's weights of good and bad rows.")
    centre: float | None = Field(
        None, ge=0, description="Keeps a reward model's numbers around zero, 0.01 for instance."
    )


class RewardFunction(Section):
    """One reward: what an answer is worth."""

    shorthand: ClassVar[str | None] = "use"
    use: str = Field(
        description="exact, number, regex, length, json, judge, model, or module:function, file.py:function."
    )
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict, description="Given to the function by name.")


class RL(Section):
    """For ``task: grpo`` and ``rloo``."""

    rewards: list[RewardFunction] = Field(default_factory=list, description="What an answer is worth; see the docs.")
    generations: int = Field(8, ge=2, description="Answers to each prompt, which are compared with each other.")
    max_new_tokens: int = Field(256, ge=1, description="Tokens of an answer at most.")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    beta: float = Field(0.0, ge=0, description="Weight of the distance to the reference; 0 asks no reference.")
    reference: Reference = Field("auto", description="As in preference.")
    iterations: int = Field(1, ge=1, description="Steps on the same answers.")
    loss: str = Field("auto", description="grpo: dapo, grpo, dr_grpo, bnpo, cispo, sapo, luspo, vespo.")
    keep_cut: bool = Field(True, description="Learn from answers that were cut at max_new_tokens.")


class Distributed(Section):
    """How a run is spread over processes, and who starts them."""

    shorthand: ClassVar[str | None] = "strategy"
    strategy: Literal["auto", "ddp", "fsdp2", "tensor-parallel", "deepspeed-zero2", "deepspeed-zero3"] = Field(
        "auto", description="auto: ddp where there is more than one process."
    )
    processes: int = Field(1, ge=1, description="How many to start on this machine, or on a Ray cluster.")
    launch: Literal["local", "torchrun", "ray"] = Field(
        "local", description="Who starts them: this command, torchrun or accelerate from outside, or Ray."
    )
    restarts: int = Field(0, ge=0, description="Times that all are started again after one has died.")
    unused_parameters: bool = Field(False, description="ddp: some trained tensors take no part in some steps.")


class Log(Section):
    """What is written while it runs. metrics.jsonl is always written."""

    every: int = Field(1, ge=1)
    progress: Literal["auto", "live", "plain", "off"] = "auto"
    report_to: Annotated[
        list[Literal["tensorboard", "trackio", "wandb", "mlflow"]],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = Field(default_factory=list, description="Loggers besides metrics.jsonl.")
    project: str = Field("veneer", description="What trackio, wandb and mlflow file the run under.")
    name: str | None = Field(None, description="The run's name there; default: that of its folder.")


class Output(Section):
    """Where the adapter, the resolved settings, the metrics and the checkpoints go."""

    shorthand: ClassVar[str | None] = "dir"
    dir: str
    overwrite: bool = False


class RunConfig(Section):
    """All settings of a run, as ``run.yaml`` keeps them."""

    task: TaskName = "sft"
    model: Model
    data: Data
    adapter: dict[str, Any] = Field(default_factory=lambda: {"method": "lora", "r": 16, "lora_alpha": 32})
    train: Train = Field(default_factory=lambda: Train.model_validate({}))
    eval: Eval = Field(default_factory=lambda: Eval.model_validate({}))
    log: Log = Field(default_factory=lambda: Log.model_validate({}))
    distributed: Distributed = Field(default_factory=lambda: Distributed.model_validate({}))
    seq2seq: Seq2Seq = Field(default_factory=lambda: Seq2Seq.model_validate({}))
    classes: Classes = Field(default_factory=lambda: Classes.model_validate({}))
    embeddings: Embeddings = Field(default_factory=lambda: Embeddings.model_validate({}))
    preference: Preference = Field(default_factory=lambda: Preference.model_validate({}))
    rl: RL = Field(default_factory=lambda: RL.model_validate({}))
    output: Output

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"path": value}
        if isinstance(value, dict) and not NAMES_ADAPTER & value.keys():
            raise ValueError(
                "an adapter needs `method: lora` (see `veneer methods`), `path: adapter_config.json`, or `start: FOLDER` "
                "of a trained one"
            )
        return value

    def dump(self) -> str:
        """The settings as YAML that reads back to the same settings."""
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True, width=110)

    def settings(self) -> dict[str, Any]:
        """The values as JSON has them, without the sections of other tasks."""
        others = {place for place, tasks in USED_BY.items() if "." not in place and self.task not in tasks}
        return self.model_dump(mode="json", exclude=others)


CLASSIFYING = ("sequence-classification", "token-classification")
PREFERRING = ("dpo", "kto", "orpo", "reward")
REINFORCING = ("grpo", "rloo")
WRITING = ("sft", "seq2seq", "dpo", "kto", "orpo", *REINFORCING)

# Sections and settings that only some tasks have a use for.
USED_BY: dict[str, tuple[str, ...]] = {
    "seq2seq": ("seq2seq",),
    "classes": CLASSIFYING,
    "embeddings": ("embeddings",),
    "preference": PREFERRING,
    "rl": REINFORCING,
    "data.packing": ("sft",),
    "data.loss_on": ("sft",),
    "data.template": ("sft", *PREFERRING, *REINFORCING),
    "data.system": ("sft", *PREFERRING, *REINFORCING),
    "eval.max_new_tokens": WRITING,
}


SECTIONS = {
    name: info.annotation
    for name, info in RunConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
}
LEAVES = {
    leaf: [section for section, other in SECTIONS.items() if leaf in other.model_fields]
    for cls in SECTIONS.values()
    for leaf in cls.model_fields
}


class ConfigError(ValueError):
    """Everything that is wrong with a run's settings, one line each."""


def load(
    path: str | Path | None,
    sets: Iterable[str] = (),
    rest: Iterable[str] = (),
    check_adapter: Callable[[dict[str, Any]], list[tuple[Loc, str]]] | None = None,
) -> RunConfig:
    """Settings from a file and from overrides.

    Args:
        path: a YAML, JSON or TOML file, or None for settings from the command line alone.
        sets: ``a.b=c`` items.
        rest: further words of the command line, ``--a.b c`` or ``--leaf c``.
        check_adapter: looks over the adapter block, which only the table of methods understands.

    Raises:
        ConfigError: anything invalid, every error with ``file:line`` and the nearest valid name.
    """
    doc = document.read(path) if path is not None else Document()
    for key, value, flag in document.overrides(sets, list(rest)):
        _override(doc, key, value, flag)
    problems: list[tuple[Loc, str]] = []
    config = None
    try:
        config = RunConfig.model_validate(doc.values)
    except ValidationError as error:
        problems = _problems(error)
    if config is not None:
        problems += _unused(config)
    block = config.adapter if config else doc.values.get("adapter")
    if isinstance(block, str):
        block = {"path": block}
    if check_adapter and isinstance(block, dict) and not any(loc[:1] == ("adapter",) for loc, _ in problems):
        problems += [(("adapter", *loc), message) for loc, message in check_adapter(block)]
    if problems or config is None:
        problems.sort(key=lambda problem: doc.line(problem[0]))
        lines = [f"{doc.where(loc)}: {message}" for loc, message in problems]
        count = "1 setting is" if len(lines) == 1 else f"{len(lines)} settings are"
        raise ConfigError(f"{count} wrong:\n  " + "\n  ".join(lines))
    if path is not None:
        _locate(config, Path(path).parent)
    return config


def _override(doc: Document, key: str, value: Any, flag: str) -> None:
    key = SHORT.get(key, key)
    loc = tuple(key.split("."))
    if len(loc) == 1 and key not in RunConfig.model_fields and len(LEAVES.get(key, [])) == 1:
        loc = (LEAVES[key][0], key)
    elif len(loc) == 1 and len(LEAVES.get(key, [])) > 1 and key not in RunConfig.model_fields:
        choices = " or ".join(f"--{section}.{key}" for section in LEAVES[key])
        raise ConfigError(f"{flag}: several sections have '{key}'; say {choices}.")
    section = SECTIONS.get(str(loc[0]))
    written = doc.values.get(loc[0])
    if len(loc) > 1 and not isinstance(written, dict) and written is not None:
        short = section.shorthand if section else "path"
        doc.values[loc[0]] = {short: written}
    if loc[0] == "adapter" and written is None and loc[-1] not in ("adapter", *NAMES_ADAPTER):
        doc.values["adapter"] = {"method": "lora"}
    if len(loc) == 1 and section and section.shorthand and isinstance(written, dict):
        loc = (loc[0], section.shorthand)
    doc.set(loc, value, flag)


def _unused(config: RunConfig) -> list[tuple[Loc, str]]:
    """Sections and settings that were written down and that the task does not read."""
    found: list[tuple[Loc, str]] = []
    for place, tasks in USED_BY.items():
        section, _, key = place.partition(".")
        holder = getattr(config, section) if key else config
        name = key or section
        idle = config.task not in tasks and name in holder.model_fields_set
        if idle and (not key or getattr(holder, name) != type(holder).model_fields[name].default):
            found.append(
                (tuple(place.split(".")), f"'{place}' means nothing to task {config.task}; it is for {_list(tasks)}.")
            )
    return found


def _list(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _problems(error: ValidationError) -> list[tuple[Loc, str]]:
    """One line per field, however many branches of a union pydantic tried."""
    found: dict[Loc, list[str]] = {}
    for one in error.errors():
        loc = tuple(one["loc"])
        depth = 2 if loc and loc[0] in SECTIONS else 1
        loc, inner = loc[:depth], loc[depth:]
        name = ".".join(map(str, loc))
        if one["type"] == "extra_forbidden":
            message = f"there is no setting '{name}'{_suggest(loc)}"
        elif one["type"] == "missing":
            message = f"'{name}' is missing{_describe(loc)}"
        else:
            if one["type"] == "literal_error" and isinstance(one["input"], str):
                choices = [choice.strip("'") for choice in re.findall(r"'[^']*'", one["ctx"]["expected"])]
                if near := difflib.get_close_matches(one["input"], choices, 1, 0.6):
                    one["msg"] += f"; did you mean {near[0]}?"
            spot = "".join(f"[{i}]" for i in inner if isinstance(i, int))
            message = f"'{name}{spot}' is {one['input']!r}: {_lower(one['msg'])}"
        messages = found.setdefault(loc, [])
        same = messages and ": " in message and message.split(": ", 1)[0] == messages[0].split(": ", 1)[0]
        messages.append("or " + message.split(": ", 1)[1] if same else message)
    return [
        (loc, ", ".join(messages).rstrip(".?") + ("?" if "did you" in messages[-1] else "."))
        for loc, messages in found.items()
    ]


def _suggest(loc: Loc) -> str:
    key = str(loc[-1])
    if key in ELSEWHERE:
        return f"; here it is called {ELSEWHERE[key]}"
    here = SECTIONS[str(loc[0])] if len(loc) == 2 else RunConfig
    near = difflib.get_close_matches(key, here.model_fields, 1, 0.6)
    if near:
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?"
    if key in LEAVES:
        return f"; {key} stands under {' or '.join(LEAVES[key])}"
    far = difflib.get_close_matches(key, LEAVES, 1, 0.7)
    if far:
        return f"; did you mean {LEAVES[far[0]][0]}.{far[0]}?"
    return f"; known are {', '.join(here.model_fields)}"


def _describe(loc: Loc) -> str:
    if len(loc) == 1:
        short = SECTIONS[str(loc[0])].shorthand
        return f"; write `{loc[0]}: ...` or `{loc[0]}: {{{short}: ...}}`"
    return ""


def _lower(text: str) -> str:
    text = text.removeprefix("Value error, ").removeprefix("Input ").removeprefix("should be ")
    return ("it must be " if not text.startswith(("an adapter",)) else "") + text[:1].lower() + text[1:]


def _locate(config: RunConfig, folder: Path) -> None:
    """A path that is not found from here is looked for beside the settings file."""

    def found(path: str) -> str:
        beside = folder / path
        bare = path.rpartition("#")[0] or path
        return str(beside) if not Path(bare).exists() and (folder / bare).exists() else path

    config.model.path = found(config.model.path)
    config.data.train = [found(p) for p in config.data.train]
    config.data.eval = [found(p) for p in config.data.eval]
    for key in ("path", "start"):
        if key in config.adapter:
            config.adapter[key] = found(config.adapter[key])
    for reward in config.rl.rewards:
        source, _, function = reward.use.rpartition(":")
        if source.endswith(".py"):
            reward.use = f"{found(source)}:{function}"
        if isinstance(reward.options.get("path"), str):
            reward.options["path"] = found(reward.options["path"])
