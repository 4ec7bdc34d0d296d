"""The tree of modules as the peer's users know it: ``q_proj.lora_A.default.weight``, the adapter's name at the leaf.

Here an adapter is one module with all its tensors; programs written for the peer filter parameter names, walk modules
and read ``layer.lora_A["default"]``. What they see is made here on demand: views whose entries are the live tensors,
and the names of parameters and state dicts that go with them. Nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from veneer.core import registry

IN_MODULES = ("lora_magnitude_vector",)
"""Parameters that the peer keeps in a module of their own, as its ``weight``."""
COPY, ORIGINAL, TOKENS = "modules_to_save", "original_module", "token_adapter"


Place = tuple[nn.Module, str, str]
"""Where a live module or tensor is kept: the module, its table (``_parameters``, say), and the key there."""


class Entries(dict):
    """Live modules or tensors by name; what is put in here is put in their places."""

    def __init__(self, places: Mapping[str, Place]):
        self.places = places
        super().__init__({name: getattr(owner, table)[leaf] for name, (owner, table, leaf) in places.items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if name in self.places:
            owner, table, leaf = self.places[name]
            getattr(owner, table)[leaf] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class ShownModules(nn.ModuleDict):
    """Modules of several adapters under one name, by adapter name."""

    def _get_name(self) -> str:
        return "ModuleDict"

    def __init__(self, modules: dict[str, Any]):
        super().__init__()
        object.__setattr__(self, "_modules", modules)


class ShownTensors(nn.Module):
    """Parameters or buffers of several adapters under one name, by adapter name: a mapping, and a module to walk."""

    def __init__(self, tensors: dict[str, Any], table: str):
        super().__init__()
        object.__setattr__(self, table, tensors)
        self.table = table

    def _get_name(self) -> str:
        return "ParameterDict" if self.table == "_parameters" else "BufferDict"

    @property
    def _tensors(self) -> dict[str, Any]:
        return getattr(self, self.table)

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._tensors[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def keys(self) -> Any:
        return self._tensors.keys()

    def values(self) -> Any:
        return self._tensors.values()

    def items(self) -> Any:
        return self._tensors.items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._tensors.get(name, default)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, dict) and dict(self._tensors) == other)

    __hash__ = nn.Module.__hash__


class Holder(nn.Module):
    """A module made for a walk: its children are other modules' own."""

    def __init__(self, modules: Mapping[str, nn.Module] = {}, parameters: Mapping[str, Any] = {}):
        super().__init__()
        object.__setattr__(self, "_modules", modules)
        object.__setattr__(self, "_parameters", parameters)


class Named(Holder):
    """A module that prints under a name of its own."""

    def __init__(self, name: str, modules: Mapping[str, nn.Module]):
        super().__init__(modules)
        self.name = name

    def _get_name(self) -> str:
        return self.name


class Tokens(Holder):
    """The peer's module around trained rows that stand beside a method."""

    token_indices: dict[str, list[int]]


def rows_trained(adapters: Mapping[str, Any]) -> dict[str, list[int]]:
    """adapter -> the numbers of the rows it trains.

    Raises:
        AttributeError: no adapter here trains rows.
    """
    found = {name: a.indices.tolist() for name, a in adapters.items() if hasattr(a, "trainable_tokens_delta")}
    if not found:
        raise AttributeError("token_indices")
    return found


def leaves(owners: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(leaf, view of it over all owners) for the modules and tensors that the owners hold themselves."""
    for table in ("_modules", "_parameters", "_buffers"):
        names = dict.fromkeys(
            leaf for owner in owners.values() for leaf, held in getattr(owner, table).items() if held is not None
        )
        for leaf in names:
            yield leaf, _view(owners, table, leaf)


def view(owners: Mapping[str, nn.Module], leaf: str) -> Any:
    """One leaf of all owners that hold a module or tensor of that name, or None."""
    for table in ("_modules", "_parameters", "_buffers"):
        if any(leaf in getattr(owner, table) for owner in owners.values()):
            return _view(owners, table, leaf)
    return None


def _view(owners: Mapping[str, nn.Module], table: str, leaf: str) -> nn.Module:
    places = {n: (owner, table, leaf) for n, owner in owners.items() if getattr(owner, table).get(leaf) is not None}
    if leaf in IN_MODULES:
        return ShownModules({name: Holder(parameters=Entries({"weight": place})) for name, place in places.items()})
    return ShownModules(Entries(places)) if table == "_modules" else ShownTensors(Entries(places), table)


# ---- one layer ------------------------------------------------------------------------------------------------------
def _parts(layer: Any) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, nn.Module]]:
    """(trained copies, trained rows beside a method, the methods' own) adapters of a layer."""
    saved, tokens = registry.AUXILIARY["modules_to_save"], registry.AUXILIARY["trainable_token_indices"]
    own = dict(layer.adapters.items())
    copies = {n: a for n, a in own.items() if isinstance(a, saved)}
    rows = {n: a for n, a in own.items() if isinstance(a, tokens)}
    return copies, rows, {n: a for n, a in own.items() if n not in copies and n not in rows}


def _inner(layer: Any) -> str:
    """What the wrapped module is called: the peer has a wrapper of its own for copies and one for rows."""
    copies, rows, methods = _parts(layer)
    if methods or not (copies or rows):
        return "base_layer"
    return ORIGINAL if copies else f"{TOKENS}.base_layer"


def children(layer: Any) -> Iterator[tuple[str, nn.Module]]:
    """The children of an adapted layer, as the peer's users know them."""
    copies, rows, methods = _parts(layer)
    inner = _inner(layer)
    if not inner.startswith(TOKENS):
        yield inner, layer.base_layer
    yield from leaves(methods)
    if copies:
        yield COPY, _view(copies, "_modules", "copy")
    if rows:
        base = {"base_layer": layer.base_layer} if inner.startswith(TOKENS) else {}
        around = Tokens(base | dict(leaves(rows)))
        around.token_indices = rows_trained(rows)
        yield TOKENS, around


def name_of(layer: Any, key: str) -> str:
    """A key of a layer's own state dict -> the name it is shown under."""
    if key.startswith("base_layer."):
        return _inner(layer) + key.removeprefix("base_layer")
    if not key.startswith("adapters."):
        return key
    _, name, rest = key.split(".", 2)
    adapter = layer.adapters[name]
    if isinstance(adapter, registry.AUXILIARY["modules_to_save"]):
        return f"{COPY}.{name}.{rest.removeprefix('copy.')}"
    shown = leaf_name(name, rest)
    return f"{TOKENS}.{shown}" if isinstance(adapter, registry.AUXILIARY["trainable_token_indices"]) else shown


def leaf_name(name: str, key: str) -> str:
    """``lora_A.weight`` of the adapter "default" -> ``lora_A.default.weight``."""
    leaf, _, rest = key.partition(".")
    if leaf in IN_MODULES:
        rest = "weight"
    return f"{leaf}.{name}" + (f".{rest}" if rest else "")


# ---- walking --------------------------------------------------------------------------------------------------------
class Shows(nn.Module):
    """A module that is walked, named and saved under other names than those of its own children."""

    def shown_name(self, key: str) -> str:
        """A key of this module's own state dict -> the name it is shown under."""
        raise NotImplementedError

    def children(self) -> Iterator[nn.Module]:
        """The modules inside as they are, which is what moving, casting and switching them needs."""
        yield from (module for module in self._modules.values() if module is not None)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        own: Any = super().state_dict(keep_vars=keep_vars)
        destination = type(own)() if destination is None else destination
        for key, value in own.items():
            destination[prefix + self.shown_name(key)] = value
        if hasattr(destination, "_metadata"):
            destination._metadata |= {prefix + key if key else prefix[:-1]: v for key, v in own._metadata.items()}
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in super().state_dict(keep_vars=True):
            shown = prefix + self.shown_name(key)
            if shown != prefix + key and shown in state_dict:
                state_dict[prefix + key] = state_dict.pop(shown)
        super()._load_from_state_dict(state_dict, prefix, *args)
