"""LoRAHub: trained LoRAs combined by constant weights that a search finds (Huang et al., 2023, arXiv:2307.13269).

    A = sum_i w_i A_i,  B = sum_i w_i B_i,  W' = W + s B A        w in [-1.5, 1.5]^n, from zero
    minimise loss(w) + regularisation mean |w|

The factors are combined, not the deltas, so there are cross terms and twice the weights is four times the delta. No
gradient is taken: ``loss`` is asked ``steps`` times, by CMA-ES (the paper's search is of its kind). The result is a
plain LoRA. Needs the package ``cma``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.engine import checkpoint
from veneer.hf.experts import Expert
from veneer.hf.model import PeftModel
from veneer.hf.tasks import get_peft_model


def search(
    model: nn.Module,
    experts: dict[str, Expert],
    adapter_name: str = "default",
    *,
    loss: Callable[[PeftModel], float],
    steps: int = 40,
    bound: float = 1.5,
    regularisation: float = 0.05,
    seed: int = 0,
) -> PeftModel:
    """Find weights for trained LoRAs, and leave their combination on the model as a plain LoRA.

    Args:
        model: the base model; wrapped in place.
        experts: LoRAs of equal rank, scale and layers.
        adapter_name: the combination's name.
        loss: the model's loss on a few examples; called without gradients.
        steps: how many combinations to try.
        bound: largest absolute weight.
        regularisation: weight of mean |w| in what is minimised.
        seed: of the search.

    Returns:
        The model; ``model.peft_config[adapter_name].lorahub_weights`` holds name -> weight.

    Raises:
        ImportError: ``cma`` is not installed.
        ValueError: experts whose factors cannot be summed, or a loss that is never finite.
    """
    try:
        import cma  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("LoRAHub's search needs the package cma: pip install cma.") from error
    tensors = _alike(experts)
    config = copy.deepcopy(next(iter(experts.values())).config)
    config.inference_mode = False
    whole = get_peft_model(model, config, adapter_name).eval()
    best: tuple[float, Sequence[float]] = (float("inf"), [0.0] * len(experts))

    @torch.no_grad()
    def score(w: Sequence[float]) -> float:
        nonlocal best
        checkpoint.put(whole.base_model, adapter_name, combined(tensors, w))
        value = float(loss(whole)) + regularisation * sum(map(abs, w)) / len(w)
        if value < best[0]:
            best = value, [float(v) for v in w]
        return value if value == value else float("inf")

    try:
        score([0.0] * len(experts))
        _minimise(cma, score, len(experts), steps - 1, bound, seed)
        if best[0] == float("inf"):
            raise ValueError("The loss was not finite for any combination; check what loss(model) returns.")
        checkpoint.put(whole.base_model, adapter_name, combined(tensors, best[1]))
    except BaseException:
        whole.base_model.unload()
        raise
    chosen: Any = whole.peft_config[adapter_name]
    chosen.lorahub_weights = dict(zip(experts, best[1], strict=True))
    return whole


def _minimise(cma: Any, score: Callable[[Sequence[float]], float], n: int, steps: int, bound: float, seed: int) -> None:
    """CMA-ES within the bounds; a single weight is tried on a grid, for which CMA-ES is not made."""
    if n == 1:
        for k in range(steps):
            score([bound * (2 * (k + 1) / steps - 1)])
        return
    options = {"bounds": [-bound, bound], "maxfevals": steps, "seed": seed + 1, "verbose": -9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = cma.CMAEvolutionStrategy([0.0] * n, bound / 3, options)
        left = steps
        while left > 0 and not strategy.stop():
            asked = strategy.ask()
            if left < len(asked):
                for w in asked[:left]:
                    score(w)
                return
            strategy.tell(asked, [score(w) for w in asked])
            left -= len(asked)


def combined(experts: list[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i of each tensor; in float32."""
    return {
        key: sum(w * tensors[key].float() for w, tensors in zip(weights, experts, strict=True))  # type: ignore[misc]
        for key in experts[0]
    }


def _alike(experts: dict[str, Expert]) -> list[dict[str, Tensor]]:
    """Each expert's tensors.

    Raises:
        ValueError: two experts differ in layers, ranks or scale.
    """
    found = {name: checkpoint.read(e.folder) for name, e in experts.items()}
    first, *others = experts
    shapes = {k: v.shape for k, v in found[first].items()}
    scale = {"lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    for name in others:
        if {k: v.shape for k, v in found[name].items()} != shapes:
            raise ValueError(
                f"LoRAHub sums factors, but '{name}' has other layers or ranks than '{first}'; mix them by "
                "method='mole'."
            )
        odd = next((f for f in scale if getattr(experts[name].config, f) != getattr(experts[first].config, f)), None)
        if odd is not None:
            raise ValueError(f"LoRAHub sums factors of one scale, but '{name}' and '{first}' differ in {odd}.")
    return list(found.values())
