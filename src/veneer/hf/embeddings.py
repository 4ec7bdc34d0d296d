"""Embedding tables that an adapter cannot do without, saved beside it: resized ones, and those it sits at.

Which modules are meant is asked of the model (``get_input_embeddings``, ``get_output_embeddings``), not of names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.adapter import Adapter
from veneer.core.parts import parts_of
from veneer.engine.adapted import Adapted, hosts
from veneer.engine.checkpoint import PREFIX
from veneer.engine.targets import original, walk
from veneer.engine.tuner import Tuner
from veneer.hf.hub import cached_config


@dataclass(frozen=True)
class Table:
    """An input or output embedding: where it is, and the wrappers around it."""

    path: str
    module: nn.Module
    wrappers: tuple[Adapted, ...]

    @property
    def weight(self) -> Tensor:
        """The base's own parameter, also while a merge has put another in its place."""
        for host in self.wrappers:
            for kept in (host.original, host.lent):
                if kept and (weight := kept.get("weight")) is not None:
                    return weight
        return self.module.weight  # type: ignore[return-value]

    def adapters(self, name: str) -> list[Adapter]:
        """What the adapter called ``name`` has planted here."""
        return [host.adapters[name] for host in self.wrappers if name in host.adapters]  # type: ignore[misc]

    def key(self, name: str) -> str:
        """The file key of the base's weight, as readers of PEFT's files expect it for this adapter."""
        here = self.adapters(name)
        below = "token_adapter.base_layer." if any(a.site.below == "token_adapter" for a in here) else ""
        return f"{PREFIX}{self.path}.{below or ('base_layer.' if here else '')}weight"

    def file_keys(self) -> list[str]:
        """Every file key under which some writer saves the base's weight."""
        place = f"{PREFIX}{self.path}."
        return [
            place + k
            for k in ("weight", "base_layer.weight", "token_adapter.base_layer.weight", "original_module.weight")
        ]


def tables(model: nn.Module) -> list[Table]:
    """The model's input and output embeddings (in this order), each once."""
    wanted = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, get)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, nn.Module):
            wanted.append(original(found))
    paths = {id(module): path for path, module in walk(model)}
    out = []
    for module in dict.fromkeys(wanted):
        path = paths.get(id(module))
        if path is not None and isinstance(getattr(module, "weight", None), Tensor):
            out.append(Table(path, module, tuple(hosts(_wrapped(model, path)))))
    return out


def _wrapped(model: nn.Module, path: str) -> nn.Module:
    """The module in the tree at the path that a layer had before it was wrapped."""
    *parents, leaf = path.split(".")
    for part in parents:
        model = getattr(original(model), part)
    return original(model)._modules[leaf]  # type: ignore[return-value]


def saved_embeddings(tuner: Tuner, name: str, save_embedding_layers: str | bool = "auto") -> dict[str, Tensor]:
    """The tables that belong into one adapter's file, under their keys there.

    A table that the adapter trains as a whole (``modules_to_save``) is in the file already; of two that are tied, only
    the input's is written.

    Args:
        tuner: the model's tuner.
        name: the adapter.
        save_embedding_layers: True: all tables; False: none; "auto": those that the adapter's method sits at, and all
            of them when the vocabulary's size is not that of the base model's own ``config.json`` on this machine.

    Raises:
        ValueError: another value of ``save_embedding_layers``.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers must be 'auto', True or False, not {save_embedding_layers!r}.")
    if not save_embedding_layers or name in tuner.prompts:
        return {}
    found = tables(tuner.model)
    if save_embedding_layers == "auto" and not resized(tuner.model, tuner.configs[name].base_model_name_or_path):
        found = [table for table in found if _sits_at(tuner, name, table)]
    out: dict[str, Tensor] = {}
    written: set[int] = set()
    for table in found:
        copied = any(a.replacement() is not None or a.overrides() for a in table.adapters(name))
        if not copied and id(table.weight) not in written:
            out[table.key(name)] = table.weight.detach()
        written.add(id(table.weight))
    return out


def _sits_at(tuner: Tuner, name: str, table: Table) -> bool:
    """Whether the method itself is at this table; trained rows and copies save what they change themselves."""
    if any(getattr(tuner.configs[name], field, None) for field in ("trainable_token_indices", "token_indices")):
        return False
    build = registry.of(str(tuner.configs[name].peft_type)).build
    helpers = tuple(registry.AUXILIARY.values())
    return any(isinstance(a, build) or not isinstance(a, helpers) for a in table.adapters(name))


def resized(model: nn.Module, base: str | None) -> bool:
    """Whether the model's vocabulary differs from the one its base was saved with. Asks nothing of the network."""
    now = _vocabulary(getattr(model, "config", None))
    path = cached_config(base) if base and now else None
    if path is None:
        return False
    try:
        before = _vocabulary(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return False
    return before is not None and before != now


def _vocabulary(config: Any) -> int | None:
    """``vocab_size``, the text part's for models of several modalities."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, dict):
        return None
    for part in (
        values,
        *(values[k] for k in ("text_config", "llm_config", "decoder") if isinstance(values.get(k), dict)),
    ):
        if isinstance(part.get("vocab_size"), int):
            return part["vocab_size"]
    return None


def take_embeddings(tuner: Tuner, name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take saved embedding tables out of an adapter file's tensors; returns path -> table.

    Raises:
        ValueError: a table of another size than the model's; nothing has been changed then.
    """
    taken: dict[str, Tensor] = {}
    for table in tables(tuner.model):
        copied = any(a.replacement() is not None for a in table.adapters(name))
        for key in table.file_keys():
            own = copied and key == f"{PREFIX}{table.path}.weight"  # the trained copy's own key
            if key in found and not own:
                taken.setdefault(table.path, found.pop(key))
        if copied:  # some writers save the copy twice
            found.pop(f"{PREFIX}{table.path}.modules_to_save.weight", None)
        if table.path in taken and taken[table.path].shape != table.weight.shape:
            mine, theirs = tuple(table.weight.shape), tuple(taken[table.path].shape)
            hint = f": call model.resize_token_embeddings({theirs[0]}) first" if mine[1:] == theirs[1:] else ""
            raise ValueError(
                f"The file holds '{table.path}' of shape {theirs}, but the model's has shape {mine}{hint}."
            )
    return taken


def put_embeddings(tuner: Tuner, taken: dict[str, Tensor]) -> None:
    """Copy tables that ``take_embeddings`` found into the base model; tied layers follow, their storage is shared."""
    for table in tables(tuner.model) if taken else ():
        if table.path in taken:
            with torch.no_grad():
                table.weight.copy_(parts_of(table.weight, taken[table.path]))
