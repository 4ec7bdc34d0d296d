"""The model card of an adapter folder: what it is, how to load it, and the front matter that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from veneer.core import registry
from veneer.core.config import PEFT_VERSION, PeftConfig
from veneer.core.files import write_text
from veneer.engine.checkpoint import holders
from veneer.engine.tuner import Tuner

NAME = "README.md"
BEGIN, END = "<!-- veneer: begin, rewritten at every save -->", "<!-- veneer: end -->"

PIPELINES = {"CAUSAL_LM": "text-generation"}
"""Task -> the hub's name for what such a model does. The others have no one name (T5 translates, sums up, ...)."""

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""What a hub id looks like."""

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$\r?\n?", re.DOTALL | re.MULTILINE)


def write_card(folder: str | Path, configs: Mapping[str, PeftConfig], model: nn.Module | None = None) -> Path:
    """Write or renew ``README.md`` in an adapter folder.

    An existing card keeps its own text and its own front matter (license, language, datasets, ...): only the library,
    the base model and the tags are brought up to date, and the part between the two marks is replaced. A card that
    would not change is not written.

    Args:
        folder: where the adapter was saved.
        configs: adapter name -> config, for every adapter saved there.
        model: the ``PeftModel`` they were saved from, for the base's name and the counts.

    Raises:
        ValueError: the front matter of the existing card is no YAML mapping.
    """
    path = Path(folder) / NAME
    facts = _Facts.of(configs, model)
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    front, body = split(old, path)
    front |= _front(configs, facts, front)
    section = f"{BEGIN}\n{_section(configs, facts)}\n{END}"
    new = join(front, _with_section(body, section, facts.base))
    if new != old:
        write_text(path, new)
    return path


@dataclass
class _Facts:
    """What the card says that no config knows."""

    base: str | None = None
    total: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    transformers: bool = False

    @classmethod
    def of(cls, configs: Mapping[str, PeftConfig], model: nn.Module | None) -> _Facts:
        named = next((c.base_model_name_or_path for c in configs.values() if c.base_model_name_or_path), None)
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, Tuner):
            return cls(named, transformers=named is not None)
        base = tuner.model
        own = getattr(getattr(base, "config", None), "_name_or_path", None)
        counts = {n: _count(tuner, n) for n in configs if n in tuner.configs}
        return cls(named or own, _size(tuner), counts, hasattr(base, "config") and hasattr(base, "save_pretrained"))


def _count(tuner: Tuner, name: str) -> int:
    """The number of values that one adapter saves."""
    own = [holder.state_dict() for _, holder, _ in holders(tuner, name)]
    own += [tuner.prompts[name].state_dict()] if name in tuner.prompts else []
    return sum(tensor.numel() for tensors in own for tensor in tensors.values())


def _size(tuner: Tuner) -> int:
    """The number of the base's own parameters."""
    added = {id(p) for host in tuner.hosts() for p in host.adapters.parameters()}
    return sum(p.numel() for p in tuner.model.parameters() if id(p) not in added)


def split(text: str, source: str | Path = "the card") -> tuple[dict[str, Any], str]:
    """A card's front matter and its body.

    Raises:
        ValueError: the front matter is no YAML mapping.
    """
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        front = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"The front matter of {source} is not valid YAML: {error}; correct it or remove the file."
        ) from error
    if not isinstance(front, dict):
        raise ValueError(f"The front matter of {source} must be a YAML mapping; correct it or remove the file.")
    return front, text[found.end() :]


def join(front: dict[str, Any], body: str) -> str:
    """The inverse of ``split``; keys are sorted, so equal cards are equal bytes."""
    head = yaml.safe_dump(front, sort_keys=True, allow_unicode=True, default_flow_style=False)
    return f"---\n{head}---\n{body if body.startswith(chr(10)) else chr(10) + body}"


def make_uploadable(folder: str | Path) -> None:
    """Take a base model that is a local path out of the front matter: the hub refuses cards that name one."""
    path = Path(folder) / NAME
    if not path.is_file():
        return
    front, body = split(path.read_text(encoding="utf-8"), path)
    base = front.get("base_model")
    if isinstance(base, str) and not is_hub_id(base):
        del front["base_model"]
        front["tags"] = [t for t in front.get("tags", []) if not str(t).startswith("base_model:adapter:")]
        write_text(path, join(front, body))


def is_hub_id(name: str) -> bool:
    """Whether a base model's name can be a hub id rather than a path of this machine."""
    return bool(REPO_ID.fullmatch(name)) and not Path(name).exists()


def _front(configs: Mapping[str, PeftConfig], facts: _Facts, old: dict[str, Any]) -> dict[str, Any]:
    methods = {str(c.peft_type).lower() for c in configs.values()}
    kept = {str(t) for t in _listed(old.get("tags")) if not str(t).startswith("base_model:adapter:")}
    tags = methods | kept | ({"transformers"} if facts.transformers else set())
    if facts.base:
        tags.add(f"base_model:adapter:{facts.base}")
    new: dict[str, Any] = {"library_name": "peft", "tags": sorted(tags)}
    if facts.base or facts.transformers:
        new["base_model"] = facts.base or ""
    pipelines = {PIPELINES[str(c.task_type)] for c in configs.values() if str(c.task_type) in PIPELINES}
    if len(pipelines) == 1 and "pipeline_tag" not in old:
        new["pipeline_tag"] = pipelines.pop()
    return new


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or [])


def _with_section(body: str, section: str, base: str | None) -> str:
    begin, end = body.find(BEGIN), body.find(END)
    if 0 <= begin < end:
        return body[:begin] + section + body[end + len(END) :]
    title = f"# Adapter for {base}\n" if base else "# Adapter\n"
    return f"\n{body.strip() or title.strip()}\n\n{section}\n"


def _section(configs: Mapping[str, PeftConfig], facts: _Facts) -> str:
    parts = ["## Adapter" if len(configs) == 1 else "## Adapters"]
    parts += [_table(name, config, facts) for name, config in configs.items()]
    parts += ["## How to load it", _loading(*next(iter(configs.items())), facts)]
    parts += ["### Framework versions", _versions()]
    return "\n\n".join(parts)


def _table(name: str, config: PeftConfig, facts: _Facts) -> str:
    rows = {"Name": name, "Method": _method(config), "Task": str(config.task_type or "")}
    for label, name_of in _ROWS.items():
        value = getattr(config, name_of, None)
        if value not in (None, "none", {}, [], False, 0.0):
            rows[label] = _shown(value)
    count, total = facts.counts.get(name), facts.total
    if count is not None:
        rows["Parameters"] = f"{count:,}" + (f" ({100 * count / total:.3g} % of the base's {total:,})" if total else "")
    lines = [f"| {label} | {value} |" for label, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


_ROWS = {
    "Rank": "r",
    "Alpha": "lora_alpha",
    "Dropout": "lora_dropout",
    "Virtual tokens": "num_virtual_tokens",
    "Target modules": "target_modules",
    "Target parameters": "target_parameters",
    "Ranks by pattern": "rank_pattern",
    "Alphas by pattern": "alpha_pattern",
    "Layers": "layers_to_transform",
    "Layer replication": "layer_replication",
    "Modules trained as a whole": "modules_to_save",
    "Trained tokens": "trainable_token_indices",
    "Biases": "bias",
}
"""Label in the card -> config field, shown where it is set."""


def _method(config: PeftConfig) -> str:
    return registry.of(str(config.peft_type)).summary.rstrip(".") or str(config.peft_type)


def _shown(value: Any) -> str:
    if isinstance(value, set | frozenset | list | tuple):
        items = [f"`{v}`" for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
        return ", ".join(items[:12]) + (f", and {len(items) - 12} more" if len(items) > 12 else "")
    if isinstance(value, dict):
        return ", ".join(f"`{k}`: {v}" for k, v in list(value.items())[:12])
    text = str(value).replace("|", "\\|")
    return f"`{text}`" if isinstance(value, str) else text


def _loading(name: str, config: PeftConfig, facts: _Facts) -> str:
    auto = AUTO_CLASSES.get(str(config.task_type), "AutoModel")
    load_base = (
        f'from transformers import {auto}\n\nbase = {auto}.from_pretrained("{facts.base}")\n'
        if facts.transformers and facts.base
        else "base = ...  # the model that the adapter was trained on\n"
    )
    folder = '"path/or/id/of/this/repository"' + ("" if name == "default" else f', subfolder="{name}"')
    ours = f"from veneer import PeftModel\n{load_base}model = PeftModel.from_pretrained(base, {folder})"
    return (
        f"With [veneer](https://pypi.org/project/veneer/):\n\n```python\n{ours}\n```\n\n"
        "With [PEFT](https://github.com/huggingface/peft) the same lines work after `from peft import PeftModel`, for "
        "the methods it knows. `model.merge_and_unload()` gives the base model with the adapter in its weights."
    )


def _versions() -> str:
    lines = [f"- PEFT {PEFT_VERSION} (format)"]
    for package in ("veneer", "transformers", "torch"):
        try:
            lines.append(f"- {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:  # run from a source tree
            continue
    return "\n".join(lines)
