"""Calls of a PeftModel: which rows go to which adapter, prompts read before the text, inputs that carry gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.core.prompt import Prompt
from veneer.engine.adapted import BASE
from veneer.hf import prompted_generation, prompts
from veneer.hf.architectures import input_table
from veneer.hf.model_tree import Tree


class Calls(Tree):
    """What of a PeftModel runs."""

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The adapted model. ``adapter_names``: one adapter per row of the batch, ``"__base__"`` for none."""
        if adapter_names != ROUTED and (adapter_names is not None or not torch.compiler.is_compiling()):
            self.base_model.route(adapter_names)
        return self._run(args, kwargs)

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        prompt = self.active_prompt if len(self.base_model.prompts) else None
        if prompt is not None:
            return prompts.forward(self, prompt, args, kwargs)
        return self.base_model(*args, **kwargs)

    @property
    def active_prompt(self) -> Prompt | None:
        """The prompt that is read before the text now, if one is active."""
        if not self.base_model.state.enabled:
            return None
        route = self.base_model.state.route
        for name in self.active_adapters if route is None else dict.fromkeys(route):
            if name in self.base_model.prompts:
                return self.base_model.prompts[name]  # type: ignore[return-value]
        return None

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """``generate`` of the base model with the adapters on; beams of a row follow the row's adapter."""
        self.base_model.route(adapter_names)
        try:
            prompt = self.active_prompt
            if prompt is not None:
                return prompted_generation.generate(self, prompt, args, kwargs)
            if any(name in self.base_model.roots for name in self.active_adapters):
                kwargs["use_cache"] = False  # each call reads the whole text, see veneer.engine.root
            return self.base_model.model.generate(*args, **kwargs)
        finally:
            self.base_model.route(None)

    def get_base_model(self) -> nn.Module:
        """The model inside (with the adapters in place; see ``unload`` to have it without)."""
        return self.base_model.model

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turn checkpointing on in the base, with inputs that carry gradients although the base is frozen."""
        self.base_model.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs
        )
        self._inputs_require_grad()

    def _inputs_require_grad(self) -> None:
        table = input_table(self.base_model.model)
        if table is not None and "_veneer_grad_hook" not in table.__dict__:
            handle = table.register_forward_hook(_require_grad)
            table.__dict__["_veneer_grad_hook"] = handle

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        self._inputs_require_grad()
        return model


ROUTED = "routed"
"""What ``adapter_names`` says once the rows have been routed."""


@torch.compiler.disable
def route(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Route a batch's rows before the forward: a compiled one would be bound to the names it was called with."""
    names = kwargs.get("adapter_names")
    if names is not None:
        _require_routable(model, names, args, kwargs)
    model.base_model.route(names)
    return args, kwargs if names is None else kwargs | {"adapter_names": ROUTED}


def _require_routable(model: Any, names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> None:
    """One known adapter for each row.

    Raises:
        ValueError: another number of names than rows, or names that no adapter has.
    """
    unknown = sorted({name for name in names if name != BASE and name not in model.base_model.configs})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there is no adapter named "
            f"'{unknown[0]}', this model has: {', '.join(model.base_model.configs)}."
        )
    given = [*args, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds"))]
    batch = next((value.shape[0] for value in given if isinstance(value, torch.Tensor) and value.dim()), len(names))
    if len(names) != batch:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {batch} respectively."
        )


def _require_grad(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and output.is_floating_point():
        output.requires_grad_(True)
