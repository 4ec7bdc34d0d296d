"""The small models of ``veneer.testing``, under the name the tests here know."""

from veneer.testing.kinds import (
    ALL as ALL,
)
from veneer.testing.kinds import (
    CONV as CONV,
)
from veneer.testing.kinds import (
    KINDS as KINDS,
)
from veneer.testing.kinds import (
    LAYER as LAYER,
)
from veneer.testing.kinds import (
    LINEAR as LINEAR,
)
from veneer.testing.kinds import (
    WEIGHTS as WEIGHTS,
)
from veneer.testing.kinds import (
    Chain as Chain,
)
from veneer.testing.kinds import (
    Conv1D as Conv1D,
)
from veneer.testing.kinds import (
    Experts as Experts,
)
from veneer.testing.kinds import (
    Kind as Kind,
)
from veneer.testing.kinds import (
    SelfAttention as SelfAttention,
)
