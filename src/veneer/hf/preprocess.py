"""Starts around ``get_peft_model``, as the peer has them: data passes over a base model, LoftQ for a packed one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.config import PeftConfig
from veneer.core.sites import Site, sites_for
from veneer.engine import targets
from veneer.hf.quantised import OriginalWeights
from veneer.hf.state_dict import tuner_of
from veneer.hf.tuner import fill_defaults
from veneer.methods import lora_calibrate as calibrate
from veneer.methods.lora import Lora, LoraConfig
from veneer.methods.lora_init import balanced, each
from veneer.methods.lora_split import place
from veneer.ops.factor import top_svd


def sites_named(model: nn.Module, config: PeftConfig) -> list[Site]:
    """The sites that ``config`` names in a base model."""
    config = copy.copy(config)
    fill_defaults(model, config)
    turned = bool(getattr(config, "fan_in_fan_out", False))
    return [s for t in targets.find(model, config) for s in sites_for(t.path, t.module, t.parameter, turned)]


def covariances(
    config: LoraConfig, sites: list[Site], compute: Callable[[], dict[Site, Tensor]] | None
) -> dict[Site, Tensor]:
    """What CorDA's start needs, from its file where that exists, else computed, and then written to it.

    Raises:
        ValueError: neither a file nor ``compute``, or a file that lacks a layer.
    """
    how = config.corda_config
    file = Path(how.covariance_file or how.cache_file or "") if how else Path()
    if file.name and file.is_file():
        known = torch.load(file, weights_only=True)
        lacking = [site.path for site in sites if site.path not in known]
        if lacking:
            raise ValueError(f"The covariance file '{file}' holds nothing for '{lacking[0]}'.")
        return {site: known[site.path] for site in sites}
    if compute is None:
        raise ValueError("CorDA needs data to run over, or a covariance_file that exists.")
    found = compute()
    if file.name:
        torch.save({site.path: c for site, c in found.items()}, file)
    return found


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Collect what ``get_peft_model`` needs to start CorDA: call it on the base model, before.

    Args:
        model: the base model.
        lora_config: with init_lora_weights="corda"; the ``covariance_file`` (or else ``cache_file``) of its
            ``corda_config`` is read where it exists, and written where it does not.
        run_model: runs the model over the calibration data.
        hooked_model: the model that ``run_model`` runs, where it is a copy.

    Raises:
        ValueError: a wrong config, no data and no file, or layers other than linear ones.
    """
    if lora_config.init_lora_weights != "corda":
        raise ValueError("preprocess_corda needs a config with init_lora_weights='corda'.")
    sites = sites_named(model, lora_config)
    calibrate.seen_inputs(sites, "corda")

    def compute() -> dict[Site, Tensor]:
        watched = sites if hooked_model is None else sites_named(hooked_model, lora_config)
        found = calibrate.input_covariances(watched, [None], lambda _: run_model())  # type: ignore[misc]
        return {site: found[seen] for site, seen in zip(sites, watched, strict=True)}

    for site, c in covariances(lora_config, sites, compute if run_model is not None else None).items():
        calibrate.note(site, c)


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Collect what ``get_peft_model`` needs to start LoRA-GA: call it on the base model, before.

    Args:
        model: the base model.
        lora_config: with init_lora_weights="lora_ga".
        train_step: runs forward and backward over some batches (no optimiser step).
        cache_file: read where it exists, written where it does not.

    Raises:
        ValueError: a wrong config, a packed weight, or no gradient.
    """
    if lora_config.init_lora_weights != "lora_ga":
        raise ValueError("preprocess_loraga needs a config with init_lora_weights='lora_ga'.")
    sites = sites_named(model, lora_config)
    if cache_file and Path(cache_file).is_file():
        found = torch.load(cache_file, weights_only=True)
    else:
        with calibrate.gathered_gradients(sites) as gradients:
            train_step()
        if not any(g.any() for g in gradients.values()):
            raise ValueError("train_step() left no gradient at any target layer; it must call loss.backward().")
        found = {f"{site.path}:{site.parameter or ''}": g for site, g in gradients.items()}
        if cache_file:
            torch.save(found, cache_file)
    for site in sites:
        calibrate.note(site, found[f"{site.path}:{site.parameter or ''}"])


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """LoftQ's one step for a base that is quantised already: s B A becomes the best of rank r for W - dequantised(W).

    Args:
        peft_model: with a LoRA adapter that has not been trained.
        model_path: a folder with the base's float weights in safetensors; default: where the base came from.
        adapter_name: the adapter.
        callback: called with the model and the layer's path after each change; False takes the change back.

    Raises:
        FileNotFoundError: no safetensors there.
        ValueError: the file has no weight for a layer, or one of another shape.
    """
    tuner = tuner_of(peft_model)
    tuner._require(adapter_name)
    base = getattr(tuner.model, "config", None)
    folder = model_path or getattr(base, "_name_or_path", "") or "."
    originals = OriginalWeights(folder, getattr(tuner.model, "base_model_prefix", ""))
    own = [(lora.site.path, lora) for _, lora in tuner.adapters(adapter_name) if isinstance(lora, Lora)]
    lacking = [path for path, _ in own if path not in originals]
    if lacking:
        raise ValueError(
            f"The safetensors of '{folder}' hold no '{lacking[0]}.weight', so LoftQ cannot compare it with "
            "the packed one."
        )
    for path, lora in own:
        w = lora.site._stored_form(originals[path])
        packed = lora.site.weight.detach().float()
        if w.shape != packed.shape:
            raise ValueError(
                f"'{originals.key(path)}' has shape {tuple(w.shape)}, but '{path}' needs {tuple(packed.shape)}."
            )
        before = [m.detach().clone() for m in lora.matrices()]
        left = (w.to(packed) - packed).reshape(*before[1].shape[:-1], before[0].shape[-1])
        place(lora, *each(lora, lambda m, r, s=lora.scaling: balanced(top_svd(m, r), s), left))
        if callback is not None and not callback(peft_model, path):
            place(lora, *before)
