"""Adapters of other methods as plain LoRA, and what can be done to a trained delta afterwards.

convert_to_lora: U_r S_r V_r^T of each layer's delta, at one rank or at the least that holds a share of sum S^2.
reduce_intruder_dimension (Shuttleworth et al., 2024, arXiv:2410.21228): with W + D = U' S' V'^T, the leading u'_j that
are near no left singular vector of W are intruders; D gains (lambda - 1) S'_j u'_j v'_j^T for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.adapted import Adapted
from veneer.engine.as_lora import (
    Combined,
    Delta,
    additive,
    as_matrices,
    copy_companions,
    delta_of,
    is_own,
    label,
    plant,
)
from veneer.engine.tuner import Tuner
from veneer.hf.state_dict import tuner_of
from veneer.ops import combining as ops
from veneer.ops.factor import gram_svd, top_svd


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """One adapter, of any additive method, as LoRA for the original base model.

    Args:
        model: a PeftModel, a tuner, or a model that adapters were injected into; it stays as it is.
        rank: the same rank at every layer, or a share of the energy in (0, 1) that each layer's rank must hold.
        adapter_name: the adapter; biases, saved modules and trained rows of it are taken along.
        progressbar: show one, a step a layer.
        compile_kwargs: compile the factorisation with these arguments of ``torch.compile``.

    Returns:
        A ``LoraConfig`` and the tensors under the keys of ``adapter_model.safetensors``.

    Raises:
        ValueError: an unknown adapter, a rank that is none, or a method whose effect is no sum onto the weight.
    """
    tuner = tuner_of(model)
    _check_rank(rank)
    best = Delta.best if compile_kwargs is None else torch.compile(Delta.best, **compile_kwargs)
    with _unmerged(tuner, adapter_name).disabled():
        found = {}
        for host in tqdm(list(_own_hosts(tuner, adapter_name)), disable=not progressbar, desc="to LoRA"):
            adapter = additive(adapter_name, host.adapters[adapter_name])
            pair, lost = best(delta_of(adapter), rank)
            found[host] = Combined(pair, getattr(adapter, "delta_bias", lambda: None)(), lost)
        name = _free_name(tuner, adapter_name)
        plant(tuner, name, [adapter_name], found)
        try:
            copy_companions(tuner, name, {adapter_name: 1.0})
            tensors = {k: v.detach().clone() for k, v in checkpoint.tensors(tuner, name).items()}
            return tuner.configs[name], tensors
        finally:
            tuner.delete(name)


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """``convert_to_lora``, written as an adapter folder that this library and the peer load.

    Raises:
        ValueError: see ``convert_to_lora``; nothing is written then.
        OSError: the folder cannot be written.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    checkpoint.write(path, tensors)
    config.write(path)


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: nn.Module,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    rank: int | None = None,
) -> dict[str, int]:
    """Add, and make active, a copy of an adapter whose intruder dimensions are weakened.

    Args:
        peft_model: a model with the adapter.
        old_adapter_name: the adapter, of any additive method; it stays as it is.
        new_adapter_name: the new LoRA adapter.
        top_k: how many leading singular vectors of the adapted weight are looked at.
        threshold_epsilon: a vector is an intruder if its largest absolute cosine with those of W is below this.
        mitigation_lambda: what remains of an intruder's singular value, in [0, 1].
        rank: of the new adapter; default: the old one's (its rank plus the number of intruders loses nothing).

    Returns:
        layer -> the number of intruders found there.

    Raises:
        ValueError: an unknown or taken name, or a method whose effect is no sum onto the weight.
    """
    tuner = tuner_of(peft_model)
    tuner._check_name(new_adapter_name)
    found, counts = {}, {}
    with _unmerged(tuner, old_adapter_name).disabled():
        for host in _own_hosts(tuner, old_adapter_name):
            adapter = additive(old_adapter_name, host.adapters[old_adapter_name])
            delta = delta_of(adapter)
            base = as_matrices(host.site, host.site.weight.float())
            changed, count = _mitigated(base, delta.matrix, top_k, threshold_epsilon, mitigation_lambda)
            pair, lost = ops.factored(changed, min(rank or delta.rank, *changed.shape[-2:]))
            found[host] = Combined(pair, getattr(adapter, "delta_bias", lambda: None)(), lost)
            counts[label(host.site)] = count
        plant(tuner, new_adapter_name, [old_adapter_name], found)
        copy_companions(tuner, new_adapter_name, {old_adapter_name: 1.0})
    tuner.set_active(new_adapter_name)
    return counts


def _mitigated(base: Tensor, delta: Tensor, top_k: int, epsilon: float, left: float) -> tuple[Tensor, int]:
    """The delta with its intruders weakened, and how many there were; (..., out, in) each."""
    shape, count = delta.shape, 0
    out = []
    for w, d in zip(base.reshape(-1, *shape[-2:]), delta.reshape(-1, *shape[-2:]), strict=True):
        own, _, _ = gram_svd(w, min(w.shape))
        u, s, v = top_svd(w + d, min(top_k, *w.shape))
        strange = (u.T @ own).abs().amax(1) < epsilon  # (top_k,)
        out.append(d - (1 - left) * (u[:, strange] * s[strange]) @ v[:, strange].T)
        count += int(strange.sum())
    return torch.stack(out).reshape(shape), count


def _check_rank(rank: int | float) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole and not (isinstance(rank, float) and 0 < rank < 1):
        raise ValueError(
            f"rank must be a positive integer, or a share of the energy between 0 and 1 such as 0.95, not {rank!r}."
        )


def _unmerged(tuner: Tuner, name: str) -> Tuner:
    tuner._require(name)
    if tuner.merged:
        raise ValueError(f"Adapters are merged ({', '.join(tuner.merged)}); unmerge before converting.")
    if name in tuner.prompts:
        raise ValueError(f"'{name}' is a prompt, which has no delta to convert.")
    return tuner


def _own_hosts(tuner: Tuner, name: str) -> Iterator[Adapted]:
    return (host for host in tuner.hosts(name) if is_own(tuner, name, host.adapters[name]))


def _free_name(tuner: Tuner, name: str) -> str:
    candidate = f"{name}_as_lora"
    while candidate in tuner.configs:
        candidate += "_"
    return candidate


def add_attention_output_twice(model: nn.Module, adapter_name: str = "default", on: bool = True) -> None:
    """Have the output projection of each ``nn.MultiheadAttention`` get its delta twice, as in the peer (up to 0.21.2).

    For adapters that were trained there: theirs is the only way to equal outputs. Lasts until it is switched off.

    Raises:
        ValueError: no such adapter, or none at an attention's output projection.
    """
    tuner = tuner_of(model)
    tuner._require(adapter_name)
    found = [h for h in _own_hosts(tuner, adapter_name) if isinstance(h.site.module, nn.MultiheadAttention)]
    found = [h for h in found if h.site.below == "out_proj"]
    if not found:
        raise ValueError(f"Adapter '{adapter_name}' sits at no nn.MultiheadAttention.")
    for host in found:
        host.set_gain(adapter_name, 2.0 if on else 1.0)
