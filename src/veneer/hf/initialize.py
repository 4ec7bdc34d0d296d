"""``initialize(model, dataloader)``: start a LoRA adapter, from data or from weights, as its settings say."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.sites import Site
from veneer.engine.tuner import Tuner
from veneer.hf import eva
from veneer.hf.calibration import bare, call, lora_config, loras_of, peek, shown
from veneer.hf.preprocess import covariances
from veneer.hf.state_dict import tuner_of
from veneer.methods import lora_calibrate as calibrate
from veneer.methods.lora import STARTS, Lora
from veneer.methods.lora_init import check_splits
from veneer.methods.lora_options import EvaConfig

BATCHES = {"eva": None, "corda": 256, "lora_ga": 64}
"""Batches that a start reads where nothing else is said; EVA stops by itself."""


def initialize(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    adapter_name: str = "default",
    forward: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Start a LoRA adapter afresh, as its ``init_lora_weights`` says. Make the optimiser afterwards.

    Args:
        model: what ``get_peft_model`` gave.
        dataloader: batches as the base model takes them (dicts of tensors; or tensors); for "eva", "corda", "lora_ga".
        adapter_name: the adapter; what it has learnt is lost.
        forward: ``batch -> output`` of the base model (its loss for "lora_ga"); default: ``model(**batch)`` on its
            device, and ``.loss``. The adapters are off meanwhile, so calling the model itself in it is right.
        max_batches: read no more than these; default: all for "eva", which stops by itself, 256 for "corda", 64 for
            "lora_ga".
        show_progress_bar: over the batches.

    Raises:
        ValueError: no LoRA, no data where a start needs some, data without labels for "lora_ga", a layer the start
            cannot serve, or a merged model. The adapter is as it was then.
    """
    tuner = tuner_of(model)
    config = lora_config(tuner, adapter_name)
    how = config.init_lora_weights
    family = how.split("_niter_")[0] if isinstance(how, str) else "plain"
    if family not in calibrate.NEEDS_DATA:
        _restart(tuner, adapter_name)
        return
    if dataloader is None:
        raise ValueError(f"init_lora_weights='{how}' starts from data: call initialize(model, dataloader).")
    batches, first = peek(dataloader, family)
    if family == "lora_ga" and forward is None:
        _require_labels(first)
    limit = max_batches if max_batches is not None else BATCHES[family]
    read = shown(itertools.islice(batches, limit), dataloader, family, limit, show_progress_bar)
    run = forward or (lambda batch: call(tuner.model, batch))
    loras = _checked(tuner, adapter_name, family)
    with bare(tuner):
        if family == "eva":
            found = eva.directions(loras, config, read, run)
        elif family == "corda":
            tokens = eva.counted_tokens(EvaConfig(use_label_mask=False))
            compute = functools.partial(calibrate.input_covariances, list(loras), read, run, tokens)
            found = covariances(config, list(loras), compute)
        else:
            found = _gradients(list(loras), read, run)
    if family == "eva":
        eva.redistribute(tuner, adapter_name, {site.path: value for site, value in found.items()})
    else:
        _restart(tuner, adapter_name, found)


def _checked(tuner: Tuner, name: str, family: str) -> dict[Site, Lora]:
    loras = loras_of(tuner, name)
    if family != "lora_ga":
        calibrate.seen_inputs(list(loras), family)
    if family != "eva":
        for lora in loras.values():
            check_splits(lora, family, times=2 if family == "lora_ga" else 1)
    return loras


def _restart(tuner: Tuner, name: str, found: Mapping[Site, Tensor] | None = None) -> None:
    """Draw the factors anew and make the start, with what was found at each site."""
    config, loras = lora_config(tuner, name), loras_of(tuner, name)
    for site, finding in (found or {}).items():
        calibrate.note(site, finding)
    how = config.init_lora_weights
    try:
        with tuner.disabled(), torch.no_grad():
            for lora in loras.values():
                lora.reset(how)
                lora.residual = lora.start_A = lora.start_B = None
                start = STARTS.get(how.split("_niter_")[0]) if isinstance(how, str) else None
                if start is not None:
                    start(lora, config)
    finally:
        calibrate.forget(loras)
        tuner.refresh()


def _require_labels(batch: Any) -> None:
    names = list(batch) if isinstance(batch, Mapping) else []
    if not any("label" in name or name.endswith("positions") for name in names):
        held = ", ".join(names) if names else type(batch).__name__
        raise ValueError(
            f"LoRA-GA needs the loss of each batch, but the data loader's batches hold no labels (they hold {held}); "
            "add 'labels', or pass forward=lambda batch: loss."
        )


def _gradients(sites: list[Site], batches: Iterable[Any], run: Callable[[Any], Any]) -> dict[Site, Tensor]:
    """LoRA-GA's pass: the gradient of the weights, summed over the batches (their number is one factor for all)."""
    with torch.enable_grad(), calibrate.gathered_gradients(sites) as gradients:
        for batch in batches:
            output = run(batch)
            loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
            if loss is None or loss.numel() != 1 or not loss.requires_grad:
                raise ValueError(
                    "LoRA-GA needs a scalar loss that depends on the weights from each batch, but the model gave "
                    f"{'none' if loss is None else f'one of shape {tuple(loss.shape)}'}; add labels or pass forward=."
                )
            loss.backward()
    if not any(g.any() for g in gradients.values()):
        raise ValueError("No target layer has a gradient from this data, so LoRA-GA cannot start from it.")
    return gradients
