"""PeftMixedModel: what ``get_peft_model(..., mixed=True)`` makes.

Every model here may hold adapters of different methods; this class says so by its type, as programs for the peer check
it. Prompts and mixtures, which sit at no layer, it refuses.
"""

from __future__ import annotations

from typing import Any

from veneer.core import registry
from veneer.core.config import PeftConfig
from veneer.core.prompt import Prompt
from veneer.core.root import Root
from veneer.hf.model import PeftModel


class PeftMixedModel(PeftModel):
    """A base model with adapters of different methods that act together.

    Raises:
        ValueError: a method that sits at no layer.
    """

    def _add(self, name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_layerless(config)
        super()._add(name, config, *args, **kwargs)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Nothing to do: an adapter brings its ``modules_to_save`` when it is added."""


def refuse_layerless(config: PeftConfig) -> None:
    """Refuse a config whose method sits at no layer.

    Raises:
        ValueError: a prompt, or a method that governs other adapters.
    """
    if issubclass(registry.of(str(config.peft_type)).build, Prompt | Root):
        raise ValueError(
            f"The provided `peft_type` '{config.peft_type}' is not compatible with the `PeftMixedModel`: it sits at no "
            "layer; use get_peft_model without mixed=True."
        )
