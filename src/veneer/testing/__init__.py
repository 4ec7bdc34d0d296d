"""The laws that every method here keeps, for the tests of methods that live elsewhere. Needs pytest, and nothing else.

::

    # test_my_method.py
    from functools import partial

    from my_package import MyConfig
    from veneer.testing import LINEAR, Laws, Row


    class TestMyMethod(Laws):
        rows = [Row("mine", partial(MyConfig, r=4), kinds=LINEAR)]

Asserted for every row at every kind of layer: the start is the base model; off is the base, bit for bit; merged equals
forward, and unmerging brings the same objects back; unloading leaves no trace; saved and loaded is the same; gradients
go where they belong; two adapters do not see each other; rows of a mixed batch equal each alone; copies and pickles are
independent; half precision keeps its dtype; checkpointed gradients are the same; one compiled graph; and a layer that
the method cannot sit at is refused before anything changes.
"""

import pytest

# before the module is imported, or a law that fails would not show what it compared
pytest.register_assert_rewrite("veneer.testing.laws")

from veneer.testing.kinds import ALL, CONV, KINDS, LINEAR, WEIGHTS, Kind  # noqa: E402
from veneer.testing.laws import Laws  # noqa: E402
from veneer.testing.row import Row  # noqa: E402

__all__ = ["ALL", "CONV", "KINDS", "LINEAR", "WEIGHTS", "Kind", "Laws", "Row"]
