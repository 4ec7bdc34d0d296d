"""From the words of a config to places in a model: names, regular expressions, layers, all-linear, parameters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from veneer.core import errors
from veneer.core.errors import NoMatchingPeftModuleError
from veneer.core.patterns import Expression, Matcher, Names, is_literal, nearest, search_suffix
from veneer.engine.places import original as original
from veneer.engine.places import walk as walk

ALL_LINEAR = "all-linear"

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task -> the names of its head, which trains as a whole and which "all-linear" therefore leaves alone."""


@dataclass(frozen=True)
class Target:
    """A place that a config asks for: a module, or one parameter of it."""

    path: str
    module: nn.Module
    parameter: str | None = None

    @property
    def name(self) -> str:
        """The path, with the parameter's name where there is one."""
        return self.path if self.parameter is None else f"{self.path}.{self.parameter}"


def find(model: nn.Module, config: Any, *, strict: bool | None = None) -> list[Target]:
    """The places ``config`` names, in the order of the model.

    Reads ``target_modules`` (a list of names, each a whole path or its end at a dot; a str is a regular expression for
    whole paths; or "all-linear"), ``target_parameters``, ``exclude_modules``, ``layers_to_transform``,
    ``layers_pattern``, ``modules_to_save`` (what trains as a whole takes no adapter) and ``task_type``; any of them may
    be missing. A model that is adapted already is seen under its own paths, so a config means the same again.

    Args:
        strict: False accepts, as the peer does, names that match nothing while others do, for lists that may name the
            modules of more than one model: tables of defaults, and configs read from a file, where it is the default.

    Raises:
        ValueError: something is asked for that the model does not have, with the nearest names.
        TypeError: ``target_parameters`` is a str.
    """
    _check(config)
    strict = not _field(config, "from_file") if strict is None else strict
    modules = list(walk(model))
    matched = _matched(model, config, modules, strict)
    allowed = _without_excluded(model, config, modules, matched, strict)
    found = _in_layers(config, allowed, strict)
    if allowed and not found:
        raise NoMatchingPeftModuleError(
            f"None of the {len(allowed)} modules of {type(model).__name__} that match, such as '{allowed[0].name}', "
            f"lies in layers_to_transform={_field(config, 'layers_to_transform')!r}"
            + (f" of layers_pattern={pattern!r}" if (pattern := _field(config, "layers_pattern")) else "")
            + "; correct the indices or the pattern."
        )
    return found


def find_named(model: nn.Module, names: Collection[str], what: str = "modules_to_save") -> list[Target]:
    """The modules whose path is one of ``names`` or ends with it at a dot, in the order of the model.

    A module inside one that is found already is not listed again.

    Raises:
        ValueError: ``names`` is a str, or one of them matches nothing.
    """
    if isinstance(names, str):
        raise ValueError(f"{what} must be a list of names, not the str '{names}'; write ['{names}'].")
    modules, wanted = list(walk(model)), Names(names)
    tops, inside = _subtrees(modules, wanted)
    _refuse_unmatched(model, what, wanted, [path for path, _ in modules])
    return [Target(path, module) for path, module in modules if path in tops and path not in inside]


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" means this module: a Linear, what stands for one when quantised, transformers' Conv1D."""
    if isinstance(module, nn.Linear):
        return True
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if kind == "Conv1D" and hasattr(module, "nf"):
        return True
    if not (isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")):
        return False
    # Some backends keep packed tensors under other names than `weight` (GPTQ, AWQ, AQLM); their classes say Linear.
    return weight.ndim == 2 if isinstance(weight, torch.Tensor) else "linear" in kind.lower()


class _AllLinear:
    """Every linear layer but the output embedding, a task's head, and what only its parent's own code reads."""

    def __init__(self, model: nn.Module, task: Any, modules: list[tuple[str, nn.Module]]):
        heads = HEADS.get(str(getattr(task, "value", task)), ())
        head, parents = _output_embedding(model), {"": model, **dict(modules)}
        self.paths = {
            path
            for path, module in modules
            if is_linear(module)
            and module is not head
            and path.split(".")[0] not in heads
            # MultiheadAttention reads its out_proj's weight and never calls it: an adapter there would do nothing.
            and not isinstance(parents[path.rpartition(".")[0]], nn.MultiheadAttention)
        }

    def match(self, path: str) -> bool:
        return path in self.paths

    def unmatched(self) -> list[str]:
        return [] if self.paths else [ALL_LINEAR]


def _field(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def _check(config: Any) -> None:
    """Refuse what contradicts itself, whatever the model."""
    names, parameters, layers = (
        _field(config, "target_modules"),
        _field(config, "target_parameters"),
        _field(config, "layers_to_transform"),
    )
    if isinstance(parameters, str):
        raise TypeError(f"target_parameters must be a list of names, not the str '{parameters}'.")
    if isinstance(names, str) and names != ALL_LINEAR and layers is not None:
        raise ValueError(
            f"layers_to_transform={layers!r} cannot be used with target_modules='{names}', a regular expression; say "
            "the layers in the expression, or give a list of names."
        )
    if _field(config, "layers_pattern") and layers is None:
        raise ValueError("layers_pattern needs layers_to_transform, the indices of the layers to adapt.")
    others = any(_field(config, f) for f in ("modules_to_save", "trainable_token_indices"))
    if not names and not parameters and (names is None or not others):
        raise NoMatchingPeftModuleError(
            "No `target_modules` passed but also no `target_parameters` found; give a list of names, a regular "
            "expression, or 'all-linear'."
        )


def _matched(model: nn.Module, config: Any, modules: list[tuple[str, nn.Module]], strict: bool) -> list[Target]:
    """What ``target_modules`` and ``target_parameters`` mean, before anything is taken out again."""
    names = _field(config, "target_modules")
    wanted: Matcher
    if names == ALL_LINEAR:
        wanted = _AllLinear(model, _field(config, "task_type"), modules)
    else:
        wanted = Expression(names) if isinstance(names, str) else Names(names or ())
    parameters = Names(_field(config, "target_parameters") or ())
    tops, inside = _subtrees(modules, Names(_field(config, "modules_to_save") or ()))
    targets: list[Target] = []
    parameter_names, seen = [], set()
    for path, module in modules:
        places = [Target(path, module)] if wanted.match(path) else []
        for own, parameter in module._parameters.items() if parameters.names else ():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter_names.append(f"{path}.{own}")
                places += [Target(path, module, own)] if parameters.match(f"{path}.{own}") else []
        targets += places if path not in tops and path not in inside else []
    lenient = not strict and bool(targets)
    if not lenient:
        _refuse_unmatched(model, "target_modules", wanted, [path for path, _ in modules])
        _refuse_unmatched(model, "target_parameters", parameters, parameter_names)
    if not targets and (names or parameters.names):
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation: "
            f"all that target_modules={_shown(names)} matches in {type(model).__name__} lies in modules_to_save="
            f"{_shown(_field(config, 'modules_to_save'))} and trains as a whole; narrow one of the two."
        )
    return targets


def _without_excluded(
    model: nn.Module, config: Any, modules: list[tuple[str, nn.Module]], matched: list[Target], strict: bool
) -> list[Target]:
    """Drop what ``exclude_modules`` names."""
    names = _field(config, "exclude_modules")
    if not names:
        return matched
    barred = Expression(names) if isinstance(names, str) else Names(names)
    paths = {path for path, _ in modules if barred.match(path)}
    left = [t for t in matched if t.path not in paths and not (t.parameter and barred.match(t.name))]
    if strict:
        _refuse_unmatched(model, "exclude_modules", barred, [path for path, _ in modules])
    if matched and not left:
        raise NoMatchingPeftModuleError(
            "No modules were targeted for adaptation: "
            f"exclude_modules={_shown(names)} takes out all {len(matched)} modules of {type(model).__name__} that are "
            f"targeted, such as '{matched[0].name}'; narrow it."
        )
    return left


def _in_layers(config: Any, targets: list[Target], strict: bool) -> list[Target]:
    """Keep what lies in ``layers_to_transform``; a target given by its whole path has said its layer already."""
    layers, pattern = _field(config, "layers_to_transform"), _field(config, "layers_pattern")
    if layers is None or layers == []:
        return targets
    layers = {layers} if isinstance(layers, int) else set(layers)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or ())
    names = _field(config, "target_modules") or ()
    whole = {*(() if isinstance(names, str) else names), *(_field(config, "target_parameters") or ())}
    kept = []
    for target in targets:
        indices = _layer_indices(target.name, patterns)
        if strict and len(indices) > 1 and target.name not in whole:
            raise ValueError(
                f"layers_to_transform={_shown(layers)} can be read in {len(indices)} ways for '{target.name}', a "
                "place in lists within lists; name the list whose layers you mean, "
                f"e.g. layers_pattern='{_list_names(target.name)[0]}'."
            )
        if target.name in whole or (indices and indices[-1] in layers):
            kept.append(target)
    return kept


def _layer_indices(path: str, patterns: list[str]) -> list[int]:
    """The positions on the way to ``path`` in lists of layers (named by ``patterns``, if any), outermost first."""
    parts = path.split(".")
    return [
        int(part)
        for i, part in enumerate(parts[1:-1], 1)
        if part.isdecimal() and (not patterns or any(search_suffix(p, ".".join(parts[:i])) for p in patterns))
    ]


def _list_names(path: str) -> list[str]:
    parts = path.split(".")
    return [parts[i - 1] for i, part in enumerate(parts) if i and part.isdecimal()]


def _subtrees(modules: list[tuple[str, nn.Module]], wanted: Names) -> tuple[set[str], set[str]]:
    """The paths ``wanted`` meets, and those of everything inside them."""
    tops, inside = set(), set()
    for path, _ in modules if wanted.names else ():  # parents come before their children
        parent = path.rpartition(".")[0]
        if wanted.match(path):
            tops.add(path)
        if parent in tops or parent in inside:
            inside.add(path)
    return tops, inside


def _output_embedding(model: nn.Module) -> nn.Module | None:
    try:
        found = cast(Any, model).get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return original(found) if isinstance(found, nn.Module) else None


def _refuse_unmatched(model: nn.Module, what: str, wanted: Matcher, names: list[str]) -> None:
    missing = wanted.unmatched()
    if not missing:
        return
    kind, owner = "parameter" if what == "target_parameters" else "module", type(model).__name__
    if isinstance(wanted, _AllLinear):
        raise NoMatchingPeftModuleError(
            f"{owner} has no linear layer for target_modules='all-linear'; name its modules instead."
        )
    if isinstance(wanted, Expression):
        none, words, said = True, missing[0], f"{what}='{missing[0]}'"
        hint = f" A str is a regular expression for the whole path; to match by name, write ['{missing[0]}']."
        hint = hint if is_literal(missing[0]) else ""
    else:
        none, words = len(missing) == len(wanted.names) if isinstance(wanted, Names) else True, _set(missing)
        said = f"{what}={missing}" if none else f"{missing} in {what}"
        hint = ""
    sentence = f"No {kind} of {owner} matches {said}; {_hint_names(missing, names)}.{hint}"
    targeting = what in ("target_modules", "target_parameters", "trainable_token_indices")
    if errors.lenient and not (none and targeting):
        warnings.warn(sentence, errors.PeftWarning, stacklevel=2)
        return
    if none and targeting:
        raise NoMatchingPeftModuleError(f"Target {kind}s {words} not found in the base model. {sentence}")
    raise ValueError(sentence)


def _set(names: list[str]) -> str:
    return "{" + ", ".join(map(repr, names)) + "}"


def _hint_names(missing: list[str], paths: list[str]) -> str:
    """The model's names that are like ``missing``, compared at the same number of parts; else some that it has."""
    near: list[str] = []
    words = (w for name in missing[:5] for w in ([name] if is_literal(name) else re.findall(r"[A-Za-z_]\w+", name)))
    for word in words:
        depth = word.count(".") + 1
        near += nearest(word, dict.fromkeys(".".join(path.split(".")[-depth:]) for path in paths))
    if near:
        return f"nearest names: {', '.join(dict.fromkeys(near))}"
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    some = [name for name in leaves if not name.isdecimal()][:8]
    return f"it has {', '.join(some)} and so on" if some else "it has none at all"


def _shown(value: Any) -> str:
    return repr(value if isinstance(value, str) or value is None else sorted(value))
