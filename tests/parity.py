"""Parity with the peer, both ways: its folder read by us, and ours read by it, must give equal outputs.

The engine alone is used on our side (``Tuner`` and ``checkpoint``), so a method can be compared before anything of
``veneer.hf`` exists; the peer is the pinned release of the tests' dependencies.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner

Factory = Callable[[], nn.Module]
Run = Callable[[nn.Module, Any], Tensor]


def call(model: nn.Module, x: Any) -> Tensor:
    """The model's output for ``x``: a tensor, or a dict of keyword arguments (then the output's ``logits``)."""
    y = model(**x) if isinstance(x, dict) else model(x)
    return y.logits if hasattr(y, "logits") else y


def randomise(parameters: Any, seed: int = 3, size: float = 0.1) -> None:
    """Move every tensor a little from where it started, so that zeros and ones hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


def peer(base: nn.Module, config: Any, seed: int = 3, size: float = 0.1) -> nn.Module:
    """The peer's model with its trained tensors moved, in eval mode."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    randomise([p for p in model.parameters() if p.requires_grad], seed, size)
    return model.eval()


def ours(base: nn.Module, config: PeftConfig, seed: int = 3, size: float = 0.1) -> Tuner:
    """Our tuner with its trained tensors moved, in eval mode; the adapter is called ``default``."""
    tuner = Tuner(base)
    tuner.add("default", config)
    tuner.set_active("default")
    randomise([p for p in tuner.parameters() if p.requires_grad], seed, size)
    return tuner.eval()


def read(base: nn.Module, folder: Path) -> Tuner:
    """Our tuner with an adapter folder loaded strictly, in eval mode."""
    tuner = Tuner(base)
    tuner.add("default", PeftConfig.read(folder))
    report = checkpoint.put(tuner, "default", checkpoint.read(folder))
    assert report.clean and report.loaded
    tuner.set_active("default")
    return tuner.eval()


def write(tuner: Tuner, folder: Path) -> None:
    checkpoint.write(folder, checkpoint.tensors(tuner, "default"))
    checkpoint.config(tuner, "default").write(folder)


def read_by_peer(base: nn.Module, folder: Path) -> nn.Module:
    """The peer's model with an adapter folder loaded, in eval mode; a warning about missing keys is an error."""
    import peft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, folder)
    missing = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
    assert not missing, missing
    return model.eval()


def gradients(model: nn.Module, x: Any) -> dict[str, Tensor]:
    """file key -> gradient of the mean square of the output, for either side's model."""
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = None
    call(model, x).square().mean().backward()
    if isinstance(model, Tuner):
        found = {}
        for prefix, holder, adapter in checkpoint.holders(model, "default"):
            own = {k: p.grad for k, p in holder.named_parameters() if p.grad is not None}
            own = adapter.outgoing(own) if adapter is not None and own else own
            found |= {prefix + k: v for k, v in own.items()}
        return found
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n.replace(".default", "").replace("modules_to_save.", ""): g for n, g in named.items()}


def both_ways(
    base: Factory,
    peft_config: Any,
    veneer_config: PeftConfig,
    x: Any,
    folder: Path,
    *,
    tolerance: float = 2e-5,
    grad_tolerance: float | None = 2e-4,
    same_keys: bool = True,
    size: float = 0.1,
) -> None:
    """Assert that either side reads the other's folder with equal outputs, equal keys, and equal gradients.

    Args:
        base: makes the base model, the same at each call.
        peft_config: the peer's settings.
        veneer_config: ours.
        x: an input of the model (a tensor, or a dict of keyword arguments).
        folder: an empty folder to write into.
        tolerance: largest difference of outputs, relative to the largest output (at least 1).
        grad_tolerance: the same for gradients; None where the peer's gradient is another one on purpose.
        same_keys: both folders hold the same keys and shapes.
        size: how far the trained tensors are moved from their start.
    """
    theirs = peer(base(), peft_config, size=size)
    expected = call(theirs, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder / "theirs")
    mine = read(base(), folder / "theirs")
    found = call(mine, x)
    assert near(found, expected, tolerance), f"their folder, read by us: off by {(found - expected).abs().max():.2e}"
    assert not near(found, call(base().eval(), x), tolerance), "the adapter changes nothing, so this compares nothing"
    if grad_tolerance is not None:
        _same_gradients(gradients(mine, x), gradients(theirs, x), grad_tolerance)

    own = ours(base(), veneer_config, seed=4, size=size)
    expected = call(own, x)
    write(own, folder / "ours")
    found = call(read_by_peer(base(), folder / "ours"), x)
    assert near(found, expected, tolerance), (
        f"our folder, read by the peer: off by {(found - expected).abs().max():.2e}"
    )
    if same_keys:
        here, there = (checkpoint.read(folder / which) for which in ("ours", "theirs"))
        assert {k: v.shape for k, v in here.items()} == {k: v.shape for k, v in there.items()}
    unknown = set(json.loads((folder / "ours" / "adapter_config.json").read_text())) - set(
        json.loads((folder / "theirs" / "adapter_config.json").read_text())
    )
    assert not unknown, f"fields that the peer does not know: {unknown}"


def _same_gradients(here: dict[str, Tensor], there: dict[str, Tensor], tolerance: float) -> None:
    shared = {k: f"{k.removeprefix('base_model.')}" for k in here if not k.startswith("base_model.model.")}
    for key, leaf in shared.items():  # the peer registers a shared tensor at its first layer
        for name, gradient in list(there.items()):
            if name.endswith("." + leaf):
                there[key] = gradient
    common = here.keys() & there.keys()
    assert common, f"no gradient has a common key: {sorted(here)[:3]} and {sorted(there)[:3]}"
    for key in common:
        scale = max(1e-3, float(there[key].abs().max()))
        off = float((here[key] - there[key]).abs().max())
        assert off <= tolerance * scale, f"gradient of {key}: off by {off:.2e} of {scale:.2e}"


needs_peer = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the peer is not installed")
