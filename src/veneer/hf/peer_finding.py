"""Functions inside ``peft`` about names: which modules they mean, and what a module is called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from veneer.core.patterns import fullmatch
from veneer.engine.targets import ALL_LINEAR, Expression, Matcher, Names, find
from veneer.hf.tuner import PeftTuner, names_of


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of the patterns that means the end of this path at a dot, or the whole of it; else the path itself."""
    return next((key for key in pattern_keys if re.match(rf"(.*\.)?({key})$", key_to_match)), key_to_match)


def match_target_against_key(target_pattern: str, key: str) -> re.Match | None:
    """Whether a ``target_modules`` expression means the whole of this path."""
    return re.fullmatch(target_pattern, key)


def is_valid_match(key: str, target_key: str) -> bool:
    """Whether ``target_key`` is this path or its end at a dot."""
    return key == target_key or key.endswith("." + target_key)


def find_minimal_target_modules(
    target_modules: list[str] | set[str], other_module_names: list[str] | set[str]
) -> set[str]:
    """The shortest endings that mean these paths and none of the others.

    Raises:
        ValueError: no list, an empty name, or a path that is in both.
    """
    if not isinstance(target_modules, list | set) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    if "" in target_modules:
        raise ValueError("target_modules should not contain an empty string.")
    wanted, others = set(target_modules), set(other_module_names)
    if wanted & others:
        raise ValueError("target_modules and other_module_names contain common elements, this should not happen.")

    def endings(path: str) -> list[str]:
        parts = path.split(".")
        return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]

    barred = {end for path in others for end in endings(path)}
    needed = {next((end for end in endings(path) if end not in barred), path) for path in wanted}
    return {end for end in needed if not any(is_valid_match(end, other) for other in needed - {end})}


def include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """The config with the names that ``target_modules="all-linear"`` stands for in this model.

    Raises:
        ValueError: another model than one of transformers, whose output layer could not be told.
    """
    words = getattr(peft_config, "target_modules", None)
    if not isinstance(words, str) or words.lower() != ALL_LINEAR:
        return peft_config
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(
            f"Only instances of PreTrainedModel support `target_modules='all-linear'`, not {type(model).__name__}: "
            "which layer is its output cannot be told."
        )
    paths = [target.path for target in find(model, peft_config)]
    peft_config.target_modules = names_of(model, paths)
    return peft_config


def inspect_matched_modules(tuner: PeftTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """{"matched": paths that ``target_modules`` of an adapter means, "unmatched": the model's other paths}."""
    words = tuner.configs[adapter_name].target_modules
    paths = [path for path, _ in tuner.model.named_modules() if path]

    def means(path: str) -> bool:
        if isinstance(words, str):
            return fullmatch(words, path)
        return any(is_valid_match(path, word) for word in words or ())

    return {
        "matched": [path for path in paths if means(path)],
        "unmatched": [path for path in paths if not means(path)],
    }


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The path of a module, or an empty string."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_submodules_with_grandparent(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, nn.Module, str]:
    """(parent, grandparent, module, the module's name in its parent) of the module at ``key``."""
    parent, _, leaf = key.rpartition(".")
    above = parent.rpartition(".")[0]
    return model.get_submodule(parent), model.get_submodule(above), model.get_submodule(key), leaf


def get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The last part of the path of a model's input embedding, or ``default``."""
    ask: Any = getattr(model, "get_input_embeddings", None)
    table = ask() if ask is not None else None
    return next((path.rpartition(".")[2] for path, module in model.named_modules() if module is table), default)


def get_no_split_modules(model: nn.Module) -> set[str]:
    """The names of the classes that must not be split between devices."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def get_in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """(in_features, out_features) of a layer; (None, None) where it has none."""
    for a, b in (("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("in_channels", "out_channels")):
        if hasattr(module, a) and hasattr(module, b):
            return getattr(module, a), getattr(module, b)
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return tuple(weight.shape)  # type: ignore[return-value]
    return None, None


def names_tied_with_embedding(model: nn.Module) -> list[str]:
    """The names of the weights that are tied to the input embedding, as the model states them."""
    keys = getattr(model, "_tied_weights_keys", None) or {}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return list(keys) if tied else []


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether ``target_modules`` (less ``exclude_modules``) of a config means the module at ``key``."""

    def matcher(words: Any) -> Matcher:
        return Expression(words) if isinstance(words, str) else Names(words)

    excluded = getattr(config, "exclude_modules", None)
    if excluded and matcher(excluded).match(key):
        return False
    wanted = config.target_modules
    layers = getattr(config, "layers_to_transform", None)
    if not wanted or not matcher(wanted).match(key):
        return False
    if layers is None or layers == [] or isinstance(wanted, str) or key in wanted:
        return True
    patterns = getattr(config, "layers_pattern", None) or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for form in [rf"(?:.*?\.)??{pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]:
        found = re.match(form, key)
        if found is not None:
            return int(found[1]) in ({layers} if isinstance(layers, int) else set(layers))
    return False


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, the module's name in its parent) of the module at ``key``."""
    parent, _, leaf = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), leaf
