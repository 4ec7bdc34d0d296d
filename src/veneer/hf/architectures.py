"""Defaults by architecture: what a method adapts when the config does not say."""

from __future__ import annotations

from torch import nn

from veneer.core.patterns import Names, nearest
from veneer.engine.targets import original, walk
from veneer.hf import architecture_table as table
from veneer.hf.architecture_table import Targets

_OWN_TABLES: dict[str, dict[str, Targets]] = {
    "IA3": table.IA3,
    "LN_TUNING": table.NORMS,
    "BEFT": table.VALUES,
    "OSF": table.ALL_PROJECTIONS,
    "ADAPTION_PROMPT": table.ATTENTION_MODULES,
}
"""Methods that adapt something else than the attention projections every other one does."""


def default_targets(peft_type: str, model_type: str) -> Targets | None:
    """The ``target_modules`` of a method for models of ``model_type``; None where there is no default.

    Some lists name the modules of several generations of a family; `present` keeps those that a model has.
    """
    found = table.OTHERWISE.get(str(peft_type), {}).get(model_type)
    if found is None:
        found = _OWN_TABLES.get(str(peft_type), table.ATTENTION).get(model_type)
    return list(found) if isinstance(found, list) else found


def present(model: nn.Module, names: Targets) -> Targets:
    """Those of a default's names that this model has: rows of the tables span several generations of a family."""
    if isinstance(names, str):
        return names
    found = Names(names)
    for path, _ in walk(model):
        found.match(path)
    return [name for name in names if name in found.met] or names


def default_feedforward(model_type: str) -> Targets | None:
    """IA3's ``feedforward_modules`` for models of ``model_type``; None where there is no default."""
    found = table.IA3_FEEDFORWARD.get(model_type)
    return list(found) if isinstance(found, list) else found


def input_table(model: nn.Module) -> nn.Module | None:
    """The model's input embedding, or None for a model that has none, such as a convolutional one."""
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def input_embedding(model: nn.Module) -> list[str]:
    """The path of the input embedding, by the model's own word: the default place of trainable tokens.

    Raises:
        ValueError: the model does not say where its input embedding is.
    """
    embedding = input_table(model)
    found = [path for path, module in walk(model) if embedding is not None and module is original(embedding)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not say where its input embedding is (get_input_embeddings); name it in the "
            "config, e.g. target_modules=['embed_tokens']."
        )
    return found


def no_default(peft_type: str, model_type: str | None) -> str:
    """The sentence for a config without ``target_modules`` and a model that no table knows."""
    remedy = "give target_modules: a list of module names, a regular expression, or 'all-linear'."
    if not model_type:
        return f"The model is not one of transformers', so {peft_type} has no default target_modules for it; {remedy}"
    near = nearest(model_type, [*_OWN_TABLES.get(str(peft_type), table.ATTENTION)])
    hint = f" (known and alike: {', '.join(near)})" if near else ""
    return f"{peft_type} has no default target_modules for models of type '{model_type}'{hint}; {remedy}"
