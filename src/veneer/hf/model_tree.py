"""A PeftModel's modules and tensors under the names that others know, and the base's attributes as its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from veneer.hf import shown, ties
from veneer.hf.state_dict import get_peft_model_state_dict


class Tree(shown.Shows):
    """What of a PeftModel is walked and named."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every parameter of the model by its live name, tied ones by their first alone."""
        found = super().state_dict(*args, **kwargs)
        whole = not args and kwargs.get("destination") is None and not kwargs.get("prefix")
        return ties.once(self, found) if whole else found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(ties.completed(self, state_dict), strict, assign)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The base model and, where there are prompts, ``prompt_encoder`` with them by name."""
        if "base_model" not in self._modules:
            return
        if len(self.base_model.prompts):
            yield "prompt_encoder", self.prompt_encoder
        yield "base_model", self.base_model

    def shown_name(self, key: str) -> str:
        start = "base_model.prompts."
        return "prompt_encoder." + key.removeprefix(start) if key.startswith(start) else key

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """adapter -> its prompt, for prompt methods.

        Raises:
            AttributeError: the model has no prompt.
        """
        if not len(self.base_model.prompts):
            raise AttributeError(f"This {type(self).__name__} has no prompt, hence no prompt_encoder.")
        return shown.ShownModules(dict(self.base_model.prompts.items()))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The rows of a prompt, (length, width), as its file holds them."""
        return get_peft_model_state_dict(self, adapter_name=adapter_name)["prompt_embeddings"]

    @property
    def prompt_tokens(self) -> dict[str, torch.Tensor]:
        """adapter -> the numbers of its virtual tokens."""
        halves = {n: self.peft_config[n].num_transformer_submodules or 1 for n in self.base_model.prompts}
        return {n: torch.arange(p.length * halves[n]) for n, p in self.base_model.prompts.items()}

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's table of token embeddings."""
        return self.base_model.model.get_input_embeddings()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            return getattr(self.base_model, name)
