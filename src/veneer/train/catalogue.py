"""The table of methods, for readers."""

from __future__ import annotations

from dataclasses import dataclass

import veneer.methods  # noqa: F401  fills the table
from veneer.core import registry


@dataclass(frozen=True)
class Row:
    """A method: its name in an ``adapter:`` block, and its source in one line."""

    name: str
    summary: str


def methods() -> list[Row]:
    """Every registered method, by name."""
    return sorted(
        (Row(str(one.peft_type).lower(), one.summary) for one in registry.METHODS.values()), key=lambda r: r.name
    )
