"""What every method here guarantees at every layer kind it sits at: ``veneer.testing``, over the whole table."""

from __future__ import annotations

from laws.table import rows as table
from veneer.testing import Laws


class TestLaws(Laws):
    """Every row of every family's file."""

    rows = table()
