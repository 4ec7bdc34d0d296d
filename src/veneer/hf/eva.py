"""EVA on a model: its data pass, the ranks that follow from it, and the peer's two functions."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.sites import Site
from veneer.engine.tuner import Tuner
from veneer.hf.calibration import bare, call, lora_config, loras_of, peek, shown
from veneer.hf.preprocess import sites_named
from veneer.hf.state_dict import tuner_of
from veneer.methods import lora_calibrate as calibrate
from veneer.methods.lora import LoraConfig
from veneer.methods.lora_options import EvaConfig


def directions(
    sites: Iterable[Site], config: LoraConfig, batches: Iterable[Any], run: Callable[[Any], Any]
) -> dict[Site, Tensor]:
    """site -> its directions, as many as its share of the ranks."""
    how = config.eva_config or EvaConfig()
    ranks = {site: _at(config, site.path).r for site in sites}
    most = {site: min(round(how.rho * r), site.in_features) for site, r in ranks.items()}
    running = calibrate.input_directions(list(ranks), most, batches, run, counted_tokens(how), how.tau)
    shared = calibrate.shared_ranks(running, ranks)
    found = {}
    for site, svd in running.items():
        assert svd.directions is not None
        a = svd.directions[: shared[site]]
        found[site] = a / svd.variance[: len(a), None].sqrt().clamp_min(1e-12) if how.whiten else a
    return dict(zip(found, calibrate.agreed(list(found.values())), strict=True))


def _at(config: LoraConfig, path: str) -> LoraConfig:
    return config.at(path)  # type: ignore[return-value]


def counted_tokens(how: EvaConfig) -> Callable[[Any], Tensor | None]:
    """batch -> (batch, length), True where neither padding nor (if so set) the label mask says otherwise."""

    def counted(batch: Any) -> Tensor | None:
        if not isinstance(batch, Mapping):
            return None
        mask = batch.get("attention_mask")
        mask = mask.bool() if mask is not None and mask.dim() == 2 else None
        labels = batch.get("labels")
        if how.use_label_mask and labels is not None and labels.dim() == 2:
            own = labels != how.label_mask_value
            mask = own if mask is None else mask & own
        return mask

    return counted


def redistribute(tuner: Tuner, name: str, found: Mapping[str, Tensor]) -> None:
    """Give the layers their new ranks and A = the directions; layers without any are let go."""
    config = lora_config(tuner, name)
    loras = {site.path: lora for site, lora in loras_of(tuner, name).items()}
    missing = sorted(loras.keys() - found.keys())
    if missing:
        raise ValueError(f"The EVA state holds nothing for '{missing[0]}'.")
    before = copy.copy(config)
    how = config.eva_config or EvaConfig()
    ranks = {path: len(found[path]) for path in loras}
    longest_first = sorted(ranks, key=lambda path: -len(path))  # so that no path is taken for the end of another
    alphas: dict[str, float] = {p: _at(before, p).lora_alpha for p in longest_first if ranks[p]}
    if how.adjust_scaling_factors:  # alpha / r, or alpha / sqrt(r), stays what it was
        root = 0.5 if config.use_rslora else 1
        alphas = {p: alpha * (ranks[p] / _at(before, p).r) ** root for p, alpha in alphas.items()}
    inner = {p for p in alphas if any(p.endswith("." + q) for q in alphas)}
    config.rank_pattern = {p: ranks[p] for p in alphas if ranks[p] != config.r or p in inner}
    config.alpha_pattern = {p: a for p, a in alphas.items() if a != config.lora_alpha or p in inner}  # type: ignore
    if 0 in ranks.values() or isinstance(config.target_modules, str):
        config.target_modules = {path for path, r in ranks.items() if r}
    state = tuner.state.active, name in tuner._training, loras
    autocast = next(iter(loras.values())).dtype == torch.float32
    sites = [lora.site for lora in loras.values()]
    for path, lora in loras.items():
        calibrate.note(lora.site, found[path])
    try:
        tuner.delete(name)
        tuner.add(name, config, autocast_adapter_dtype=autocast)
    finally:
        calibrate.forget(sites)
    tuner.set_active(*state[0], trainable=state[1])


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Callable[..., Any] | None = None,
    prepare_layer_inputs_fn: Any = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Layer path -> A (rank, in) as EVA finds it; for ``initialize_lora_eva_weights(eva_state_dict=...)``.

    Args:
        model: a PeftModel whose config says "eva", or a base model together with ``peft_config``.
        forward_fn: ``(model, batch) -> output``; default: ``model(**batch)``.
        prepare_model_inputs_fn, prepare_layer_inputs_fn: not taken; padding and unlabelled tokens are left out by the
            batch's own attention_mask and labels.

    Raises:
        ValueError: see ``initialize``.
    """
    if prepare_model_inputs_fn is not None or prepare_layer_inputs_fn is not None:
        raise ValueError(
            "prepare_model_inputs_fn and prepare_layer_inputs_fn are not taken here: which tokens count follows from "
            "attention_mask and labels of each batch; mark others with labels of -100."
        )
    batches = shown(peek(dataloader, "eva")[0], dataloader, "eva", None, show_progress_bar)
    if peft_config is not None:
        sites, base = sites_named(model, peft_config), model
        mode: contextlib.AbstractContextManager = contextlib.nullcontext()
        config = peft_config
    else:
        tuner = tuner_of(model)
        config = lora_config(tuner, adapter_name)
        sites, base, mode = list(loras_of(tuner, adapter_name)), tuner.model, bare(tuner)
    calibrate.seen_inputs(sites, "eva")
    with mode:
        run = (lambda b: forward_fn(base, b)) if forward_fn is not None else (lambda b: call(base, b))
        return {site.path: value for site, value in directions(sites, config, batches, run).items()}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    prepare_model_inputs_fn: Any = None,
    prepare_layer_inputs_fn: Any = None,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """EVA's start, from data or from a state that ``get_eva_state_dict`` gave: ``initialize`` under the peer's name.

    Raises:
        ValueError: the adapter's config does not say "eva", or neither data nor state is given.
    """
    tuner = tuner_of(model)
    if lora_config(tuner, adapter_name).init_lora_weights != "eva":
        raise ValueError("initialize_lora_eva_weights needs a config with init_lora_weights='eva'.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("initialize_lora_eva_weights needs a dataloader or an eva_state_dict.")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    redistribute(tuner, adapter_name, eva_state_dict)
