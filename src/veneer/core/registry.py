"""The one table of methods: ``peft_type`` -> (config class, adapter class), filled by the decorators below."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.core.config import PeftConfig


class _Types(type):
    """Makes ``PeftType`` read like an enum while methods, also third parties', may still add members."""

    _members: dict[str, PeftType] = {}

    def __call__(cls, value: str) -> PeftType:
        try:
            return cls._members[str(value)]
        except KeyError:
            raise ValueError(
                f"'{value}' is not a known peft_type; known are {', '.join(sorted(cls._members))}."
            ) from None

    def __iter__(cls) -> Iterator[PeftType]:
        return iter(cls._members.values())

    def __len__(cls) -> int:
        return len(cls._members)

    def __contains__(cls, value: object) -> bool:
        return value in cls._members

    def __getitem__(cls, name: str) -> PeftType:
        return cls._members[name]

    def __getattr__(cls, name: str) -> PeftType:
        try:
            return cls._members[name]
        except KeyError:
            raise AttributeError(f"PeftType has no member {name}") from None

    @property
    def __members__(cls) -> dict[str, PeftType]:
        return dict(cls._members)


class PeftType(str, metaclass=_Types):
    """The method of an adapter, as ``adapter_config.json`` spells it. Members appear as methods register."""

    @classmethod
    def add(cls, value: str) -> PeftType:
        if value not in cls._members:
            cls._members[value] = str.__new__(cls, value)
        return cls._members[value]

    @property
    def value(self) -> str:
        return str.__str__(self)

    @property
    def name(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return str.__str__(self)

    def __repr__(self) -> str:
        return f"<PeftType.{self.value}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return PeftType, (self.value,)

    def __deepcopy__(self, memo: dict) -> PeftType:
        return self


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    peft_type: PeftType
    config: type[PeftConfig]
    build: Any
    """An ``Adapter`` subclass, or for prompt methods a ``Prompt`` subclass."""

    @property
    def summary(self) -> str:
        """The first line of the method's module: its name, authors, year and source."""
        import sys

        doc = sys.modules[self.build.__module__].__doc__ or ""
        return doc.strip().split("\n")[0]


METHODS: dict[str, Method] = {}
AUXILIARY: dict[str, Any] = {}


def method(peft_type: str, config: type[PeftConfig]) -> Callable[[type], type]:
    """Enter an adapter (or prompt) class and its config into the table.

    Raises:
        ValueError: another class already holds this ``peft_type``.
    """

    def enter(build: type) -> type:
        known = METHODS.get(peft_type)
        if known is not None and known.build.__qualname__ != build.__qualname__:
            raise ValueError(
                f"peft_type '{peft_type}' is taken by {known.build.__module__}.{known.build.__qualname__}."
            )
        METHODS[peft_type] = Method(PeftType.add(peft_type), config, build)
        return build

    return enter


def auxiliary(option: str) -> Callable[[type], type]:
    """Enter the adapter that serves a config option which any method may carry (say ``modules_to_save``)."""

    def enter(build: type) -> type:
        AUXILIARY[option] = build
        return build

    return enter


def load_others() -> None:
    """Load the methods of other packages: their entry points in the group ``veneer.methods`` name modules or classes.

    One that cannot be loaded is passed over with a warning: a broken package must not keep others from working.
    """
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # another's code may raise anything
            package = point.dist.name if point.dist is not None else point.value
            warnings.warn(
                f"The method '{point.name}' of the package {package} could not be loaded from {point.value} "
                f"({type(error).__name__}: {error}); repair or uninstall the package.",
                stacklevel=2,
            )


GROUP = "veneer.methods"
"""The group of entry points under which a package offers methods."""


def of(peft_type: str) -> Method:
    """The table's row for ``peft_type``.

    Raises:
        ValueError: no method has registered under this name.
    """
    try:
        return METHODS[str(peft_type)]
    except KeyError:
        raise ValueError(
            f"No method is registered for peft_type '{peft_type}'; registered are {', '.join(sorted(METHODS))}. A "
            f"method of another package is there once the package is installed (entry points '{GROUP}')."
        ) from None
