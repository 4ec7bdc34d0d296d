"""Running a model under a root: a first pass to look at the text, then the call itself with the gains it asked for.

Both happen in one hook before the model's forward, so training, ``generate`` and a call of the inner model alike go
through it. The gains stay until the next call: gradient checkpointing recomputes under the same ones.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.core import lean
from veneer.core.config import PeftConfig
from veneer.core.root import Root
from veneer.engine.adapted import Adapted
from veneer.engine.blueprint import Blueprint

if TYPE_CHECKING:
    from veneer.engine.tuner import Tuner


def draw(tuner: Tuner, build: type[Root], config: PeftConfig) -> Blueprint:
    """A root, ready to be planted: it is saved as what an adapter's (zero) sites share.

    Raises:
        ValueError: bad settings, a member that is not there, or one that another root governs.
    """
    config.check()
    wanted = build.folders(config)
    taken = [m for root in tuner.roots.values() for m in root.members if m in wanted]
    if taken:
        raise ValueError(f"The adapter '{taken[0]}' is governed by another mixture already; load it under a new name.")
    hosts = {
        module.site.path: module
        for module in tuner.model.modules()
        if isinstance(module, Adapted) and any(name in module.adapters for name in wanted)
    }
    return Blueprint([], [], shared=build.on(tuner.model, config, hosts, tuner.configs))


def prepare(tuner: Tuner, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before each call of the model: set the gains of the active root's members, or forget those of the last call.

    Raises:
        ValueError: a call that goes on from a key-value cache, or a mixed batch with rows for the root.
    """
    state = tuner.state
    governed = {member for root in tuner.roots.values() for member in root.members}
    if governed & state.gains.keys():
        state.gains = {name: gain for name, gain in state.gains.items() if name not in governed}
    wanted = state.active if state.route is None else state.route
    name = next((n for n in wanted if n in tuner.roots), None)
    if name is None or not state.enabled:
        return
    if state.route is not None:
        raise ValueError(f"'{name}' weighs the adapters of a whole batch, so it cannot serve single rows of one.")
    cache = kwargs.get("past_key_values")
    if cache is not None and (not hasattr(cache, "get_seq_length") or cache.get_seq_length()):
        raise ValueError(
            f"'{name}' reads the whole text in each call, so it cannot go on from a key-value cache; pass "
            "use_cache=False to generate."
        )
    root = tuner.roots[name]
    hidden = _first_pass(tuner, root, model, args, kwargs)
    state.gains = state.gains | root.gains(hidden)


def _first_pass(tuner: Tuner, root: Root, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """(batch, length, dim): the model's last hidden state with every member at its first strength."""
    strengths = root.first_pass()
    accepted = lean.arguments(model)
    asked = {"use_cache": False, "past_key_values": None, "logits_to_keep": 1, "labels": None}
    own = {k: v for k, v in asked.items() if k in accepted} | {"output_hidden_states": True, "return_dict": True}
    with torch.no_grad(), contextlib.nullcontext() if strengths else tuner.disabled():
        tuner.state.gains = tuner.state.gains | strengths
        output = model.forward(*args, **(kwargs | own))  # past the hooks, of which this runs in one
    return output.hidden_states[-1]
