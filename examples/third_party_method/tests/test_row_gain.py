"""The laws of veneer, over a method of another package."""

from functools import partial

from veneer_row_gain import RowGainConfig

from veneer.testing import Laws, Row


class TestRowGain(Laws):
    rows = [Row("row_gain", partial(RowGainConfig), tested=frozenset({"linear", "conv1d_hf"}))]
