"""A run's settings: typed sections, unknown keys forbidden, all errors at once with their place in the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from veneer.train import document
from veneer.train.document import Document, Loc
from veneer.train.names import ELSEWHERE, SHORT
from veneer.train.sections import (
    RL,
    Classes,
    Data,
    Distributed,
    Embeddings,
    Eval,
    Log,
    Model,
    Output,
    Preference,
    Section,
    Seq2Seq,
    Train,
)

TaskName = Annotated[
    Literal[
        "sft", "seq2seq", "sequence-classification", "token-classification", "embeddings",
        "dpo", "kto", "orpo", "reward", "grpo", "rloo",
    ],
    BeforeValidator(lambda value: value.lower().replace("_", "-") if isinstance(value, str) else value),
]  # fmt: skip
NAMES_ADAPTER = {"method", "path", "peft_type", "start"}


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
                "an adapter needs `method: lora` (see `veneer methods`), `path: adapter_config.json`, or"
                " `start: FOLDER`, a trained one"
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
    overrides = document.overrides(sets, list(rest))
    task = next((value for key, value, _ in reversed(overrides) if key == "task"), doc.values.get("task", "sft"))
    task = str(task).lower().replace("_", "-")
    for key, value, flag in overrides:
        _override(doc, key, value, flag, [one for one in LEAVES.get(key, []) if task in USED_BY.get(one, (task,))])
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


def _override(doc: Document, key: str, value: Any, flag: str, sections: list[str]) -> None:
    """Set one key; ``sections`` are those that have it and that the task reads."""
    key = SHORT.get(key, key)
    loc = tuple(key.split("."))
    if len(loc) == 1 and key not in RunConfig.model_fields and len(sections) == 1:
        loc = (sections[0], key)
    elif len(loc) == 1 and len(sections) > 1 and key not in RunConfig.model_fields:
        choices = " or ".join(f"--{section}.{key}" for section in sections)
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
