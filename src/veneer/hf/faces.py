"""Classes that other libraries check with ``isinstance``, one wrapper here standing for many of the peer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from veneer.core import registry
from veneer.engine.adapted import Adapted


class Face(type):
    """A class without instances of its own: what is one of it is told by what the layer holds."""

    says: Callable[[Any], bool]

    def __instancecheck__(cls, thing: Any) -> bool:
        return bool(cls.says(thing)) if "says" in vars(cls) else super().__instancecheck__(thing)


def face(name: str, doc: str, says: Callable[[Any], bool]) -> type:
    """A class called ``name`` whose instances are those for which ``says`` holds."""
    return Face(name, (), {"__doc__": doc, "says": staticmethod(says), "__module__": __name__})


def holding(peft_type: str, kinds: Sequence[str] = ()) -> Callable[[Any], bool]:
    """Whether a module is an adapted layer (of one of ``kinds`` of sites, if given) with an adapter of this method."""

    def says(thing: Any) -> bool:
        if not isinstance(thing, Adapted) or (kinds and thing.site.kind not in kinds):
            return False
        row = registry.METHODS.get(peft_type)
        return row is not None and any(isinstance(a, row.build) for a in thing.adapters.values())

    return says


def _is_helper(thing: Any, *options: str) -> bool:
    builds = tuple(b for option, b in registry.AUXILIARY.items() if not options or option in options)
    return isinstance(thing, Adapted) and any(isinstance(a, builds) for a in thing.adapters.values())


def _is_tuner_layer(thing: Any) -> bool:
    """An adapted layer, unless all that it holds are helpers (copies, trained rows, biases)."""
    if not isinstance(thing, Adapted):
        return False
    helpers = tuple(registry.AUXILIARY.values())
    return not len(thing.adapters) or any(not isinstance(a, helpers) for a in thing.adapters.values())


def _is_lora(thing: Any) -> bool:
    """LoRA, or AdaLoRA, whose layers the peer makes of LoRA's."""
    return holding("LORA")(thing) or holding("ADALORA")(thing)


BaseTunerLayer = face("BaseTunerLayer", "Any layer that a method's adapters are around.", _is_tuner_layer)
AuxiliaryTrainingWrapper = face(
    "AuxiliaryTrainingWrapper",
    "A module with a trained copy or trained rows beside the method.",
    lambda thing: _is_helper(thing, "modules_to_save", "trainable_token_indices"),
)
ModulesToSaveWrapper = face(
    "ModulesToSaveWrapper", "A module with a trained copy.", lambda thing: _is_helper(thing, "modules_to_save")
)
TrainableTokensWrapper = face(
    "TrainableTokensWrapper", "A module with trained rows.", lambda thing: _is_helper(thing, "trainable_token_indices")
)
LycorisLayer = face(
    "LycorisLayer", "An adapted layer that holds LoHa or LoKr.", lambda t: any(holding(m)(t) for m in ("LOHA", "LOKR"))
)
LoraLayer = face("LoraLayer", "An adapted layer that holds a LoRA adapter.", _is_lora)
