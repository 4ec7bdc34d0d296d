"""What a method writes that stands at the whole model: before each call it decides how strong other adapters are."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.core.adapter import without_graphs
from veneer.core.config import PeftConfig
from veneer.core.placed import Placed

PerLayer = dict[str, Tensor]
"""layer's path -> a gain that broadcasts to the layer's output."""


class Root(Placed):
    """One method's parameters for a whole model, and the adapters (members) that it governs.

    While a root is active, its members are active too, each at the strength that ``gains`` says for the call. Its
    ``state_dict()`` is saved under ``base_model.``; members are adapters of their own, saved in folders of their own.

    Attributes:
        members: names of the adapters it governs.
        trains_members: whether they train along.
    """

    def __getstate__(self) -> dict[str, Any]:
        return without_graphs(self.__dict__)

    members: tuple[str, ...] = ()
    trains_members: bool = False
    public: ClassVar[frozenset[str]] = frozenset()
    """Names of own methods that the model offers as its own."""

    @classmethod
    def folders(cls, config: Any) -> dict[str, str]:
        """Member -> the folder it is loaded from."""
        return {}

    @classmethod
    def on(cls, model: nn.Module, config: PeftConfig, hosts: dict[str, Any], configs: dict[str, PeftConfig]) -> Root:
        """Build it for this model.

        Args:
            model: the base model; only read.
            config: the settings.
            hosts: path -> wrapper (``site``, ``adapters``), in the order of the model's modules.
            configs: the settings of the adapters that are there already.

        Raises:
            ValueError: a member is missing or of a kind that cannot be governed.
        """
        raise NotImplementedError

    def first_pass(self) -> dict[str, float]:
        """Strength of each member in the pass that ``gains`` reads; empty for the bare base model."""
        return {}

    def gains(self, hidden: Tensor) -> dict[str, PerLayer]:
        """Member -> layer -> gain, from the last hidden state (batch, length, dim) of the first pass."""
        raise NotImplementedError
