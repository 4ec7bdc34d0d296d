"""The sections of a run's settings, each key with its type, its limits and its meaning."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Files = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


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
