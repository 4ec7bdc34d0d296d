"""What an answer is worth: small checks that are built in, the user's own functions, reward models and judges.

A reward function is called with the prompts and the answers of a batch, and with every column of their rows by name:

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import json as json_module
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Reward = Callable[..., Sequence[float | None]]
Texts = list[str]
NUMBER_OF = "number_of_the_row"
"""The one column that goes through the trainer."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(
    prompts: Texts,
    completions: Texts,
    *,
    column: str = "answer",
    extract: str | None = None,
    case: bool = False,
    **columns: list[Any],
) -> list[float]:
    """1 where the answer is what ``column`` says.

    Args:
        prompts: not read.
        completions: the answers.
        column: of the data.
        extract: a pattern whose first group (or all of it) is compared, in place of the whole answer.
        case: upper and lower case differ.
        columns: of the data.
    """

    def plain(text: str) -> str:
        return " ".join(text.split() if case else text.lower().split())

    def said(text: str) -> str | None:
        if extract is None:
            return text
        found = re.search(extract, text, re.DOTALL)
        return found and (found.group(1) if found.re.groups else found.group(0))

    wanted = _column(columns, column, "exact")
    return [
        float((part := said(text)) is not None and plain(part) == plain(str(right)))
        for text, right in zip(completions, wanted, strict=True)
    ]


def number(prompts: Texts, completions: Texts, *, column: str = "answer", **columns: list[Any]) -> list[float]:
    """1 where the last number of the answer is the last one of ``column``."""

    def last(text: Any) -> float | None:
        found = NUMBER.findall(str(text))
        return float(found[-1].replace(",", "")) if found else None

    wanted = _column(columns, column, "number")
    pairs = [(last(text), last(right)) for text, right in zip(completions, wanted, strict=True)]
    return [float(a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6)) for a, b in pairs]


def regex(
    prompts: Texts, completions: Texts, *, pattern: str, whole: bool = False, **columns: list[Any]
) -> list[float]:
    """1 where ``pattern`` is found in the answer, or with ``whole`` is all of it."""
    compiled = re.compile(pattern, re.DOTALL)
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(text.strip()) is not None) for text in completions]


def length(
    prompts: Texts,
    completions: Texts,
    *,
    least: int = 0,
    most: int | None = None,
    unit: str = "words",
    **columns: list[Any],
) -> list[float]:
    """1 within ``least`` and ``most`` words (or characters), falling to 0 at twice as far away."""

    def worth(size: int) -> float:
        if size < least:
            return size / least
        return 1.0 if most is None or size <= most else max(0.0, 2 - size / max(most, 1))

    if not least and most is None:
        raise ValueError("The reward 'length' needs the option 'least' or 'most'; without them all answers are alike.")
    if unit not in ("words", "characters"):
        raise ValueError(f"The reward 'length' counts words or characters, not {unit}.")
    return [worth(len(text.split()) if unit == "words" else len(text)) for text in completions]


def json(prompts: Texts, completions: Texts, *, keys: Iterable[str] = (), **columns: list[Any]) -> list[float]:
    """1 for a JSON object that has all ``keys``, half for any other JSON, 0 for what is none."""

    def worth(text: str) -> float:
        try:
            value = json_module.loads(text)
        except ValueError:
            return 0.0
        return 1.0 if isinstance(value, dict) and set(keys) <= value.keys() else 0.5

    return [worth(text) for text in completions]


def _column(columns: dict[str, list[Any]], name: str, reward: str) -> list[Any]:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"The reward '{reward}' reads the column '{name}', and the rows have {', '.join(columns) or 'none'}{hint}"
        )
    return columns[name]


def _model(**options: Any) -> Reward:
    from veneer.train.reward_model import RewardModel  # loads a model, and is asked for seldom

    return RewardModel(**options)


def _judge(**options: Any) -> Reward:
    from veneer.train.judge import scorer  # loads a model, and is asked for seldom

    return scorer(**options)


BUILT_IN: dict[str, Reward] = {"exact": exact, "number": number, "regex": regex, "length": length, "json": json}
MADE: dict[str, Callable[..., Reward]] = {"model": _model, "judge": _judge}
"""Rewards that are made before they can be asked."""


def find(use: str, options: dict[str, Any], folder: Path = Path()) -> Reward:
    """The reward function that a setting names.

    Args:
        use: a built-in one, ``module:function``, or ``file.py:function``.
        options: given to it by name.
        folder: where files are looked for.

    Raises:
        ValueError: there is no such function, or it does not take these options; with the nearest name.
    """
    if use in MADE:
        return MADE[use](**options)
    found = BUILT_IN.get(use) or _own(use, folder)
    _takes(use, found, options)
    partial = functools.partial(found, **options)
    functools.update_wrapper(partial, found)
    return partial


def check(use: str, options: dict[str, Any]) -> None:
    """Refuse a reward that cannot be found, without loading a model for it.

    Raises:
        ValueError: as ``find``; or a model or judge that is not named.
    """
    if use not in MADE:
        find(use, options)
    elif use == "model" and "path" not in options:
        raise ValueError("The reward 'model' needs the option 'path', the output folder of a task: reward run.")
    elif use == "judge" and not {"model", "adapter"} & options.keys():
        raise ValueError("The reward 'judge' needs the option 'model', a folder, a hub id, or with 'url' a name there.")


def _own(use: str, folder: Path) -> Reward:
    source, _, name = use.rpartition(":")
    if not source:
        near = difflib.get_close_matches(use, [*BUILT_IN, *MADE], 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*BUILT_IN, *MADE])}."
        raise ValueError(
            f"There is no reward '{use}'; {hint} One of your own is named module:function or file.py:function."
        )
    if source.endswith(".py"):
        module = _file(folder / source if not Path(source).exists() else Path(source))
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise ValueError(f"The reward '{use}' cannot be imported: {error}.") from None
    found = getattr(module, name, None)
    if not callable(found):
        near = difflib.get_close_matches(name, [n for n in vars(module) if callable(vars(module)[n])], 1)
        raise ValueError(f"{source} has no function '{name}'" + (f"; did you mean {near[0]}?" if near else "."))
    return found


def _file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"There is no file '{path}' with a reward function.")
    name = f"veneer_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _takes(use: str, function: Reward, options: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    named = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    own = [name for name in named if name not in ("prompts", "completions")]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and use not in BUILT_IN
    for key in options:
        if key not in own and not open_ended:
            near = difflib.get_close_matches(key, own, 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(own) or 'none'}."
            raise ValueError(f"The reward '{use}' has no option '{key}'; {hint}")
    needed = [p.name for p in parameters.values() if p.name in own and p.default is p.empty and use in BUILT_IN]
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"The reward '{use}' needs the option '{missing[0]}'.")


class Checked:
    """A reward function whose answers are looked at, with texts in place of turns.

    Args:
        use: its name in the settings.
        function: what is called.
        rows: the columns of every row, found by the number that the trainer hands on, so that they reach the function
            as they stand in the data.
    """

    def __init__(self, use: str, function: Reward, rows: Sequence[dict[str, Any]] | None = None):
        self.use, self.function, self.rows = use, function, rows
        self.__name__ = re.sub(r"\W+", "_", Path(use).name if ".py:" in use else use)

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One number for each answer; None where the function has nothing to say.

        Raises:
            ValueError: it gives no list of as many numbers.
        """
        texts = [text(said) for said in completions]
        if self.rows is not None:
            columns = _columns([self.rows[i] for i in columns[NUMBER_OF]])
        takes = inspect.signature(self.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            columns = {name: value for name, value in columns.items() if name in takes}
        found = self.function(prompts=[text(said) for said in prompts], completions=texts, **columns)
        if not isinstance(found, list | tuple) or len(found) != len(texts):
            got = f"{len(found)} values" if isinstance(found, list | tuple) else type(found).__name__
            raise ValueError(f"The reward '{self.use}' must give a list of {len(texts)} numbers, and gave {got}.")
        try:
            worth = [None if value is None else float(value) for value in found]
        except (TypeError, ValueError) as error:
            raise ValueError(f"The reward '{self.use}' must give numbers: {error}.") from None
        if any(value is not None and not math.isfinite(value) for value in worth):
            raise ValueError(f"The reward '{self.use}' gave a value that is no finite number.")
        return worth


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def text(said: Any) -> str:
    """What is said: a text, or the last turn of a conversation."""
    return str(said[-1]["content"]) if isinstance(said, list) and said else str(said)
