"""The table that the laws run over: a row per method and noteworthy option. A new method adds a row, and has all laws.

Rows live beside each other in ``rows_*.py`` files by family; each exports a list ``ROWS``.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from veneer.testing import Row as Row


def rows() -> list[Row]:
    """Every row of every family's file."""
    found: list[Row] = []
    for module in sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)])):
        if module.startswith("rows_"):
            found += importlib.import_module(f"laws.{module}").ROWS
    names = [row.name for row in found]
    assert len(set(names)) == len(names), "row names must be distinct"
    return found
