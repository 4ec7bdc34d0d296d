"""Where the training floor meets the library: adapter settings in, adapted models out."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import veneer as library
import veneer.methods  # fills the table of methods
from veneer.core import registry
from veneer.engine import checkpoint
from veneer.methods.lora_calibrate import NEEDS_DATA
from veneer.train.document import Loc

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SYNONYMS = {"rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}

# Rates that the methods' papers and benchmarks found, where they lie far from LoRA's.
LEARNING_RATES = {"IA3": 5e-3, "VERA": 4e-3, "C3A": 1e-1, "PROMPT_TUNING": 3e-2, "P_TUNING": 3e-3}
LEARNING_RATES |= {"PREFIX_TUNING": 1e-2, "FOURIERFT": 1e-2, "BOFT": 1e-3, "OFT": 1e-3}


# Methods of whole weight changes, which do best on all linear layers; the others know their own places.
EVERYWHERE = {
    "LORA",
    "ADALORA",
    "OFT",
    "HRA",
    "LOHA",
    "LOKR",
    "DELORA",
    "GLORA",
    "GRALORA",
    "HIRA",
    "MISS",
    "BONE",
    "PSOFT",
}
EVERYWHERE |= {"ROAD", "VERA", "RANDLORA", "SHIRA", "C3A", "VBLORA", "WAVEFT", "FOURIERFT", "BOFT", "DEFT", "TINYLORA"}


def table() -> dict[str, Any]:
    """Every method's config class by its ``peft_type``."""
    return {str(name): method.config for name, method in registry.METHODS.items()}


def _method(name: str) -> str | None:
    spelled = name.upper().replace("-", "_")
    known = table()
    if spelled in known:
        return spelled
    bare = {key.replace("_", ""): key for key in known}
    return bare.get(spelled.replace("_", ""))


def _expand(block: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Loc, str]]]:
    """The block as keyword arguments with ``peft_type``, from ``method: lora``, the file at ``path``, or ``start``."""
    values = {k: v for k, v in block.items() if k not in ("method", "path", "start")}
    if "start" in block:
        if values or "path" in block or "method" in block:
            other = next(iter({**block, **values}.keys() - {"start"}))
            return values, [((other,), f"'{other}' cannot be set beside 'start', which is trained on as it is.")]
        if not (Path(block["start"]) / CONFIG_FILE).is_file():
            return values, [(("start",), f"there is no trained adapter in '{block['start']}' ({CONFIG_FILE}).")]
    if "path" in block or "start" in block:
        file = Path(block.get("path") or block["start"])
        file = file / CONFIG_FILE if file.is_dir() else file
        if not file.is_file():
            return values, [(("path",), f"there is no adapter config '{file}'.")]
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            return values, [(("path",), f"{file}:{error.lineno} is not valid JSON ({error.msg}).")]
        if not isinstance(stored, dict) or "peft_type" not in stored:
            return values, [(("path",), f"{file} has no 'peft_type', so it is not an adapter config.")]
        return {**stored, **values}, []
    named = str(block.get("method", block.get("peft_type")))
    method = _method(named)
    if method is None:
        near = difflib.get_close_matches(named.upper(), table(), 3, 0.5)
        hint = f"did you mean {' or '.join(n.lower() for n in near)}?" if near else "`veneer methods` lists them."
        return values, [(("method",), f"there is no method '{named}'; {hint}")]
    return {**values, "peft_type": method}, []


def problems(block: dict[str, Any]) -> list[tuple[Loc, str]]:
    """What is wrong with an adapter block: (place in the block, message) each."""
    values, found = _expand(block)
    if found:
        return found
    cls = table().get(str(values["peft_type"]))
    if cls is None:
        return [(("path",), f"the method '{values['peft_type']}' is not known; `veneer methods` lists what is.")]
    known = {field.name for field in dataclasses.fields(cls)}
    for key in [k for k in values if k not in known]:
        near = [SYNONYMS[key]] if SYNONYMS.get(key) in known else difflib.get_close_matches(key, known, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else f"; {cls.__name__} knows {', '.join(sorted(known))}."
        found.append(((key,), f"{cls.__name__} has no setting '{key}'{hint}"))
    if not found:
        try:
            build(block).check()
        except (ValueError, TypeError, NotImplementedError) as error:
            found.append(((), f"{cls.__name__}: {error}"))
    return found


def build(
    block: dict[str, Any],
    notices: list[str] | None = None,
    steps: int = 1_000_000,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """The library's config of an adapter block.

    An inline LoRA-like block that names no targets gets all linear layers, the choice that does best at equal size. A
    config saved for inference is set to train, with a notice.

    Args:
        block: as in the settings.
        notices: what was changed is said here.
        steps: the length of the run, for a method with a schedule of its own that does not say; while it is not known
            yet, any large number stands in for it.
        task_type: where the block does not say.

    Raises:
        ValueError: the block names no known method, or its values are invalid together.
    """
    values, found = _expand(block)
    if found:
        raise ValueError(found[0][1])
    cls = table()[str(values.pop("peft_type"))]
    known = {field.name for field in dataclasses.fields(cls)}
    notices = notices if notices is not None else []
    if values.pop("inference_mode", False) and "start" not in block:
        notices.append("The adapter config says inference_mode: true, which would train nothing; it trains here.")
    inline = not {"path", "start"} & block.keys()
    if inline and str(cls.type) in EVERYWHERE and "target_modules" in known and not _says_targets(values):
        values["target_modules"] = "all-linear"
    values["task_type"] = values.get("task_type") or task_type
    if "total_step" in known and values.get("total_step") is None:
        values["total_step"] = steps
    return cls(**values)


def _says_targets(values: dict[str, Any]) -> bool:
    return any(values.get(key) for key in ("target_modules", "target_parameters"))


def resolved(config: Any) -> dict[str, Any]:
    """The block that rebuilds ``config``: its method and every field that is not at its default."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("inference_mode", "peft_version")}
    plain = type(config)().to_dict()
    kept = {k: _plain(v) for k, v in values.items() if k != "peft_type" and v != plain.get(k) and v is not None}
    if getattr(config, "adapters", None):  # where a mixture comes from, which its own file need not say
        kept["adapters"] = _plain(config.adapters)
    return {"method": str(config.peft_type).lower(), **kept}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return getattr(value, "value", value)


def learning_rate(config: Any, hidden: int | None) -> float:
    """The rate when none is set: the method's own, else 5e-4 (2000 / hidden)^0.78, about 3e-4 for a 7B model.

    The rule is that of the "LoRA Without Regret" study's training recipes, capped for very small models.
    """
    method = str(config.peft_type)
    if method in LEARNING_RATES:
        return LEARNING_RATES[method]
    return float(f"{min(2e-3, 5e-4 * (2000 / hidden) ** 0.781):.1e}") if hidden else 2e-4


def attach(model: nn.Module, config: Any, start: str | Path | None = None) -> Any:
    """``model`` with an adapter, named ``default``, to train: a fresh one, or the one in the folder ``start``."""
    return load(model, start, trainable=True) if start else library.get_peft_model(model, config)


def starts_from_data(config: Any) -> bool:
    """Whether the adapter's start has to read batches first (EVA, CorDA, LoRA-GA)."""
    how = getattr(config, "init_lora_weights", None)
    return isinstance(how, str) and how.split("_niter_")[0] in NEEDS_DATA


def start(model: Any, batches: Iterable[dict[str, Tensor]]) -> None:
    """Give a fresh adapter the start that its settings ask for, from ``batches``."""
    library.initialize(model, batches, show_progress_bar=False)


def load(model: nn.Module, folder: str | Path, trainable: bool = False) -> Any:
    """``model`` with the adapter of ``folder``."""
    return library.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def add(model: Any, folder: str | Path, name: str) -> None:
    """One more adapter, under ``name``, beside those ``model`` has."""
    model.load_adapter(str(folder), adapter_name=name)


def restore(model: Any, folder: str | Path) -> None:
    """Put the tensors of ``folder`` into the adapter ``model`` has."""
    library.set_peft_model_state_dict(model, library.load_peft_weights(str(folder), device="cpu"))


def save_training_state(model: Any, folder: str | Path) -> None:
    """Write what the method gathers between steps, for a run that goes on from ``folder``."""
    checkpoint.write_training_state(folder, model.base_model)


def load_training_state(model: Any, folder: str | Path) -> None:
    """Give the method back what it had gathered when ``folder`` was written."""
    checkpoint.read_training_state(folder, model.base_model)


def read_config(folder: str | Path) -> Any:
    """The config of a saved adapter."""
    return library.PeftConfig.from_pretrained(str(folder))


def penalty(model: Any) -> Any:
    """The adapter's own term of the loss (AdaLoRA's orthogonality, a router's balance), or None."""
    return model.base_model.penalty()


def after_step(model: Any, step: int) -> None:
    """Let the method do what it does between steps (AdaLoRA's budget)."""
    model.base_model.after_step(step)
