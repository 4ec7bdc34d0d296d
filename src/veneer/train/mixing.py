"""``veneer mix``: from folders of trained LoRAs to a mixture of them in a folder of its own.

Where gates train this is a run of ``veneer train`` with an adapter block that names the folders; the ways that need no
training share what stands around a run: the loss and the answers before and after, and the report.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from veneer.engine.combine import ENTRYWISE, RULES, add_weighted_adapter
from veneer.hf import experts as folders
from veneer.hf.lorahub import search
from veneer.hf.mixtures import METHODS, mix
from veneer.methods.lora_options import ArrowConfig
from veneer.train import adapters, document, models, recipes
from veneer.train.config import Model, RunConfig
from veneer.train.prepare import Prepared, prepare
from veneer.train.trainer import held_out_loss

TRAINED = ("mole", "xlora")
"""Methods whose gates train."""
FREE = (*[name for name in METHODS if name not in TRAINED], *RULES)
"""Methods without training: a router that is computed, a search, and the rules of ``add_weighted_adapter``."""
FROM_SCRATCH = ("mola", "mixlora", "loramoe", "poly", "lily")
EXAMPLES = 32
"""Training rows that LoRAHub's search takes its loss on, where the settings do not say."""


def experts(given: Sequence[str]) -> dict[str, str]:
    """A name for each adapter -> its folder.

    Args:
        given: folders or hub ids of adapters, folders full of them, ``name=folder``, any of these joined by commas.

    Raises:
        ValueError: fewer than two adapters, or two of one name.
    """
    found: dict[str, str] = {}
    for word in [one for text in given for one in text.split(",") if one]:
        name, equals, where = word.partition("=")
        folder = Path(where if equals else word).expanduser()
        inside = [] if equals or (folder / adapters.CONFIG_FILE).is_file() else _below(folder)
        for one, at in [(p.name, str(p)) for p in inside] or [(name if equals else folder.name, str(folder))]:
            if one in found:
                raise ValueError(f"Two adapters are called '{one}': {found[one]} and {at}; name them, as {one}2={at}.")
            if one == "default":
                raise ValueError(f"The mixture itself is called 'default'; give '{at}' another name, as expert={at}.")
            found[one] = at
    if len(found) < 2:
        raise ValueError(f"A mixture needs two adapters or more, and --adapters names {len(found)}.")
    return found


def _below(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob(f"*/{adapters.CONFIG_FILE}"))


def check(method: str) -> None:
    """Refuse what is no way of mixing trained adapters.

    Raises:
        ValueError: naming the ways there are, or the command for a method that trains its experts itself.
    """
    if method.lower().replace("-", "") in FROM_SCRATCH:
        raise ValueError(
            f"{method} trains its experts together with its routes and takes no trained ones: "
            f"veneer train --adapter.method {method} --model MODEL --data FILE --out DIR."
        )
    if method not in (*TRAINED, *FREE):
        raise ValueError(f"There is no method '{method}'; trained LoRAs are mixed by {', '.join((*TRAINED, *FREE))}.")


def check_options(method: str, options: dict[str, Any]) -> None:
    """Refuse options that a method without training does not have.

    Raises:
        ValueError: naming those it has.
    """
    if method == "arrow":
        known = {field.name for field in dataclasses.fields(ArrowConfig)} | {"general"}
        known -= {"task_adapter_names", "gks_adapter_names"}
    elif method == "lorahub":
        known = {name for name, p in inspect.signature(search).parameters.items() if p.kind is p.KEYWORD_ONLY}
        known = known - {"loss"} | {"examples"}
    else:
        known = set(inspect.signature(add_weighted_adapter).parameters)
        known -= {"tuner", "adapters", "name", "combination_type"}
    if method.startswith(ENTRYWISE) and "density" not in options:
        raise ValueError(f"{method} keeps a share of each adapter's entries: say which, as --adapter.density 0.5.")
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(sorted(known))}."
            raise ValueError(f"--adapter.{key}: {method} has no option '{key}'; {hint}")


def defaults(named: dict[str, str]) -> dict[str, Any]:
    """Settings that the adapters agree on: their base, and the system message and template of their prompts.

    Raises:
        ValueError: adapters that cannot be mixed, or that name no base.
    """
    read = folders.read(named)
    bases = [e.config.base_model_name_or_path for e in read.values() if e.config.base_model_name_or_path]
    settings: dict[str, Any] = {"model.path": bases[0]} if bases else {}
    runs = [_run(e.folder) for e in read.values()]
    for key in ("system", "template"):
        values = [run.get("data", {}).get(key) for run in runs]
        if values[0] is not None and all(value == values[0] for value in values):
            settings[f"data.{key}"] = values[0]
    return settings


def _run(folder: Path) -> dict[str, Any]:
    file = folder / "run.yaml"
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def split(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(options of the method, the other words): ``--adapter.density 0.5`` is ``{"density": 0.5}``."""
    options: dict[str, Any] = {}
    rest: list[str] = []
    words = list(words)
    while words:
        taken = [words.pop(0)]
        if taken[0].startswith("--") and "=" not in taken[0] and words and not words[0].startswith("--"):
            taken.append(words.pop(0))
        if taken[0].startswith("--adapter."):
            options |= {key.removeprefix("adapter."): value for key, value, _ in document.overrides([], taken)}
        else:
            rest += taken
    return options, rest


def with_data(
    config: RunConfig, method: str, named: dict[str, str], options: dict[str, Any], console: Console
) -> recipes.Outcome:
    """Combine without training, and say what it does to the held-out loss and to answers.

    Args:
        config: model, data and output; its adapter block is overwritten.
        method: one of ``FREE``.
        named: the adapters.
        options: of the method.
        console: where progress goes.

    Raises:
        ValueError: unusable data, adapters or options.
    """
    first = next(iter(folders.read(named).values())).config
    config.adapter = {"method": "lora", "r": first.r}  # what the rows are checked with
    prepared = prepare(config)
    prepared.config.adapter = {"method": method, "adapters": named, **options}
    console.print(f"{len(named)} adapters, {method}: nothing is trained.")

    def make(base: Any) -> Any:
        return mix(base, named, method, **_asked(method, options, prepared))

    return recipes.without_training(prepared, make)


def _asked(method: str, options: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
    """The options, with a search's loss on the first training rows."""
    if method != "lorahub":
        return options
    options = dict(options)
    rows = prepared.train.rows[: int(options.pop("examples", EXAMPLES))]
    batch = prepared.config.train.batch_size

    def loss(model: Any) -> float:
        return held_out_loss(model, rows, prepared.collate, batch, prepared.task.losses(prepared, model))

    return {"seed": prepared.config.train.seed, **options, "loss": loss}


def without_data(settings: Model, out: str, method: str, named: dict[str, str], options: dict[str, Any]) -> None:
    """Combine and save, with no rows to measure anything on.

    Raises:
        ValueError: a search, which needs rows; adapters or options that cannot be used.
    """
    if method == "lorahub":
        raise ValueError("LoRAHub searches for the weights of the least loss; say on which rows: --data FILE.")
    mix(models.load_model(settings), named, method, **options).save_pretrained(out)
    models.load_tokenizer(settings).save_pretrained(out)


def block(method: str, named: dict[str, str]) -> str:
    """The adapter block of a run that trains gates, as one word of the command line."""
    return json.dumps({"method": method, "adapters": named})
