"""Config files of both kinds: an adapter's JSON (it has ``peft_type``) and a run's settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.train import adapters, config, document

ENDINGS = tuple(document.READERS)


def find(folder: Path) -> list[Path]:
    """Every config file in a folder and below.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'; name one, as in `veneer configs ls my_configs`.")
    return sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS and _is_config(path))


def _is_config(path: Path) -> bool:
    """JSON files may be anything; the ones with neither a method nor a model are not ours."""
    try:
        values = document.read(path).values
    except ValueError:
        return path.suffix != ".json" or "config" in path.stem
    return path.suffix != ".json" or is_adapter(values) or {"model", "data"} <= values.keys()


def is_adapter(values: dict[str, Any]) -> bool:
    """Whether a file's values are an adapter's settings rather than a run's."""
    return "peft_type" in values


def errors(path: Path) -> list[str]:
    """What is wrong with a file, with places; nothing if it is fine."""
    try:
        doc = document.read(path)
        if is_adapter(doc.values):
            return [f"{doc.where(loc)}: {message}" for loc, message in adapters.problems({"path": str(path)})]
        config.load(path, check_adapter=adapters.problems)
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def summary(path: Path, folder: Path) -> tuple[str, str, str, str]:
    """(name, kind, main settings, state) for a list."""
    name = str(path.relative_to(folder))
    try:
        values = document.read(path).values
    except (ValueError, OSError) as error:
        return name, "?", "", str(error)
    found = errors(path)
    state = "ok" if not found else found[0] if len(found) == 1 else f"{len(found)} errors"
    if not is_adapter(values):
        adapter = values.get("adapter", "lora")
        return name, "run", f"{adapter if isinstance(adapter, str) else adapter.get('method', '')}", state
    main = ("r", "lora_alpha", "num_virtual_tokens", "target_modules", "task_type")
    parts = [f"{key} {_short(values[key])}" for key in main if values.get(key)]
    return name, str(values["peft_type"]).lower(), ", ".join(parts), state


def whole(path: Path) -> str:
    """A file with all defaults filled in.

    Raises:
        ValueError: the file is wrong.
    """
    values = document.read(path).values
    if is_adapter(values):
        found = errors(path)
        if found:
            raise ValueError("\n".join(found))
        full = adapters.build({"path": str(path)}).to_dict()
        return json.dumps({k: _sorted(v) for k, v in sorted(full.items())}, indent=2, default=str) + "\n"
    return config.load(path, check_adapter=adapters.problems).dump()


def _short(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
